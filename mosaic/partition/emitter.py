"""Writes one rank's local program: nodes at local sizes, each under the modes of its origin."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mosaic.graph.emit import insert
from mosaic.graph.modes import Modes, set_modes
from mosaic.layout import Place, Shard
from mosaic.masks.op import ATTENTIONS
from mosaic.runtime import rng

aten = torch.ops.aten
#: What the plan decided about an attention: each axis's part, and all of them together.
DECIDED = ("planned", "problem")


@dataclass
class Emitter:
    """Appends to ``graph`` at its insertion point; knows the rank and nothing of rules."""

    graph: fx.Graph
    rank: int
    group: str
    modes: Modes

    def op(self, like: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        self.switch(like.meta.get("modes"))
        node = insert(self.graph, like, target, args, kwargs, name=like.name)
        if target in ATTENTIONS:  # which another axis may cut
            node.meta.update({key: like.meta[key] for key in DECIDED if key in like.meta})
        return node

    def function(self, like: fx.Node, target: Any, args: Any, name: str | None = None) -> fx.Node:
        """A collective or a helper: in ``like``'s modes, and never recomputed in backward."""
        self.switch(like.meta.get("modes"))
        node = insert(self.graph, like, target, args, name=name)
        node.meta.pop("recompute", None)
        return node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return insert(self.graph, node, operator.getitem, (node, index))

    def shard(self, place: Place) -> str:
        """This rank's part of a place, as collectives take it."""
        return Shard(place, self.rank, self.group).encode()

    def switch(self, modes: Modes | None) -> None:
        """Grad mode and autocast as the user had them where this node was captured."""
        if modes is None or modes == self.modes:
            return
        self.modes = modes
        node = self.graph.create_node("call_function", set_modes, (modes.encode(),))
        node.meta["val"] = None

    def marked(
        self, like: fx.Node, target: Any, args: Any, kwargs: Any, val: Any, meta: dict
    ) -> fx.Node:
        """An attention that a later pass replaces: its value is given, not computed."""
        self.switch(like.meta.get("modes"))
        return insert(self.graph, like, target, args, kwargs, val=val, meta=meta, name=like.name)

    def take(self, like: fx.Node, x: fx.Node, runs: Any, dim: int) -> fx.Node:
        """Stretches of a dim: one slice each, joined if there are several."""
        if list(runs) == [(0, x.meta["val"].shape[dim], 1)]:
            return x
        runs = runs or ((0, 0, 1),)
        parts = [self.op(like, aten.slice.Tensor, (x, dim, *run), {}) for run in runs]
        return parts[0] if len(parts) == 1 else self.op(like, aten.cat.default, (parts, dim), {})

    def seed(self, like: fx.Node, device: str) -> fx.Node:
        with self.graph.inserting_before(self.first()):
            node = insert(self.graph, like, rng.draw_seed, (self.group, device), name="seed")
            node.meta.pop("recompute", None)
            return node

    def first(self) -> fx.Node:
        return next(n for n in self.graph.nodes if n.op != "placeholder")
