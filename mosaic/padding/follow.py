"""Follows rows of padding through a program, and keeps them out of what is real.

Of every dim that follows the length the first rows are real, the others padding: finite numbers
that mean nothing. An op is right as it is where it does not mix rows, which the table of rules
knows: the real rows and the padding are two shards, and the op is local. One that does gets its
padding masked (``rules.py``), or NotPaddedError says that it has no such form.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mosaic.api.methods import Ring
from mosaic.graph.emit import insert
from mosaic.graph.lengths import Length, NotPaddedError, named_arguments
from mosaic.graph.ops import is_pointwise, key
from mosaic.layout import Place
from mosaic.masks.constants import Constants
from mosaic.partition.probing import probe
from mosaic.partition.table import RULES, TABLE, Rule
from mosaic.partition.values import Axis
from mosaic.torch_private import has_decomposition

aten = torch.ops.aten
Places = tuple[Place, ...]

#: Rows of the table that are functions, and neither count positions from the end nor look rows up
#: by position: what is local for them does not mix rows.
BY_ROW = frozenset(
    "matmul layer_norm rms_norm group_norm softmax.int log_softmax.int _softmax _log_softmax "
    "view _unsafe_view permute transpose.int t unsqueeze squeeze squeeze.dim squeeze.dims stack "
    "unbind.int split.Tensor split_with_sizes select.int slice.Tensor cat repeat "
    "repeat_interleave.self_int view_as_complex view_as_real constant_pad_nd pad "
    "sum sum.dim_IntList mean mean.dim var.correction var.dim var_mean.correction std.correction "
    "std.dim amax amin max min any any.dim any.dims all all.dim all.dims logsumexp prod "
    "prod.dim_int linalg_vector_norm norm.ScalarOpt_dim max.dim min.dim argmax argmin cumsum "
    "cumprod logcumsumexp sort sort.stable topk glu dropout tril triu flip roll "
    "cross_entropy_loss nll_loss_nd embedding index.Tensor mosaic::with_history "
    "mosaic::counted_mask scaled_dot_product_attention _native_batch_norm_legit_no_training".split()
)
#: Ops with a number that may as well be a tensor.
WITH_NUMBER = ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor")
#: Arguments that may follow the length: such numbers, and sizes of results, which are compared.
SIZES = {
    **dict.fromkeys("view _unsafe_view expand full zeros ones".split(), "size"),
    **dict.fromkeys("new_zeros new_ones new_full".split(), "size"),
    **dict.fromkeys("arange arange.start arange.start_step slice.Tensor".split(), "end"),
    "repeat": "repeats",
    **dict.fromkeys(WITH_NUMBER, "other"),
}


@dataclass
class Follower:
    """``places``: where rows are in each node's value; of several results a list."""

    graph: fx.Graph
    length: Length
    handlers: Mapping[str, Any]
    places: dict[fx.Node, Any] = field(default_factory=dict)
    constants: Constants = field(default_factory=Constants)
    rewrites: int = 0
    weights: set[fx.Node] = field(default_factory=set)  # softmaxes in which padding has no weight
    _real: dict[tuple[Place, torch.device], fx.Node] = field(default_factory=dict)

    def run(self) -> None:
        for node in list(self.graph.nodes):
            try:
                if node.op == "call_function":
                    self.places[node] = self.places_of(node)
                elif node.op != "output":
                    self.places[node] = self.new_rows(node)
            except NotPaddedError as error:
                raise NotPaddedError(error.reason, error.node or node) from error

    def places_of(self, node: fx.Node) -> Any:
        """Where rows are in a node's value; the node may be rewritten."""
        if node.target is operator.getitem:
            several, index = node.args
            return self.places[several][index]
        if node.target is aten._assert_tensor_metadata.default:
            return ()
        name = key(node.target)
        numbers = self.length.numbers.get(node, {})
        if numbers.keys() - {SIZES.get(name)}:
            raise NotPaddedError(f"{name} takes a number that follows the length")
        if name in WITH_NUMBER and numbers:
            node.update_arg(1, self.number(node, *numbers["other"]))
        follows = self.length.follows.get(node, ())
        if not (numbers or self.operands(node) or any(any(slopes) for slopes in follows)):
            return [()] * len(follows) if isinstance(node.meta.get("val"), (tuple, list)) else ()
        handler = self.handlers.get(name)
        return self.by_row(node) if handler is None else handler(self, node)

    def operands(self, node: fx.Node) -> list[tuple[fx.Node, Place]]:
        """The operands that hold rows of padding, and where."""
        return [(x, place) for x in node.all_input_nodes for place in self.places[x]]

    # --- what does not mix rows ------------------------------------------------------------

    def by_row(self, node: fx.Node) -> Any:
        kept, mixed = self.split(node)
        if mixed:
            raise NotPaddedError(f"{key(node.target)} mixes rows")
        return self.checked(node, kept)

    def split(self, node: fx.Node) -> tuple[list[Any], list[tuple[fx.Node, Place]]]:
        """Where rows are in the result, and operands of which the op mixes rows."""
        kept, mixed = [], []
        for x, place in self.operands(node):
            found = self.probed(node, x, place)
            if found is None:
                mixed.append((x, place))
            else:
                kept.append(found)
        return kept, mixed

    def probed(self, node: fx.Node, x: fx.Node, place: Place) -> Any:
        """Where the rows of an operand are in the result; None if they meet others."""
        if not is_by_row(node.target):
            raise NotPaddedError(f"{key(node.target)} may look at other rows")
        axis = Axis(self.length.axis, place.mesh_axis, place.layout, Ring())
        found = probe(axis, RULES, node, {x: place})
        several = found if isinstance(found, tuple) else (found,)
        places = [p and self.regular(p, place) for p in several]
        if not any(places) or (len(places) > 1 and not all(places)):
            return None
        return places if isinstance(node.meta["val"], (tuple, list)) else places[0]

    def regular(self, found: Place, place: Place) -> Place | None:
        """A place in rows of the axis, where a rule has read several elements as one, or one as
        several."""
        n, m = place.layout.n, found.layout.n
        if m % n or found.layout != place.layout.scale(m // n):
            return None
        return Place(place.layout, found.dim, found.outer, found.inner * (m // n))

    def checked(self, node: fx.Node, kept: Sequence[Any]) -> Any:
        """The places of a result, if they are all dims that follow the length."""
        val = node.meta["val"]
        if isinstance(val, (tuple, list)):
            results = [[some[i] for some in kept] for i in range(len(val))]
            follows = self.length.follows.get(node, (None,) * len(val))
            return [unique(ps, f, v) for ps, f, v in zip(results, follows, val, strict=True)]
        return unique(kept, self.length.follows.get(node, (None,))[0], val)

    def new_rows(self, node: fx.Node, first: Sequence[Place] = ()) -> Places:
        """Dims of a result that follow the length of themselves."""
        (slopes,) = self.length.follows[node]
        taken = {place.dim for place in first}
        dims = [d for d, slope in enumerate(slopes) if slope and d not in taken]
        if any(slopes[d] != 1 for d in dims):
            raise NotPaddedError("has several elements for each row")
        shape = node.meta["val"].shape if dims else ()
        new = [self.length.place(d, shape[d] - self.length.bucket.high) for d in dims]
        return unique([*first, *new], slopes, node.meta.get("val"))

    # --- what is written -------------------------------------------------------------------

    def write(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node before ``like``."""
        self.rewrites += 1
        with self.graph.inserting_before(like):
            return insert(self.graph, like, target, args, kwargs)

    def masked(self, node: fx.Node, x: fx.Node, places: Sequence[Place], fill: Any) -> fx.Node:
        """``x``, and ``fill`` in its rows of padding."""
        held, dtype = self.places[x], x.meta["val"].dtype
        if not dtype.is_floating_point:
            fill = bool(fill) if dtype == torch.bool else int(fill)
        for place in places:
            real = self.real(node, place, x.meta["val"])
            x = self.write(node, aten.where.ScalarOther, real, x, fill)
        self.places[x] = held
        return x

    def real(self, node: fx.Node, place: Place, like: Tensor) -> fx.Node:
        """Which elements are real, to be broadcast to ``like``: boolean."""
        n, outer, inner = place.layout.n, place.outer, place.inner
        if (place.at(0), like.device) not in self._real:
            first = next(n for n in self.graph.nodes if n.op == "call_function")
            at = self.write(first, aten.arange.default, n, device=like.device)
            rows = self.count(first, place)
            found = self.write(first, aten.lt.Tensor, at, rows)
            if (outer, inner) != (1, 1):
                found = self.write(first, aten.view.default, found, [1, n, 1])
                found = self.write(first, aten.expand.default, found, [outer, n, inner])
                found = self.write(first, aten.reshape.default, found, [outer * n * inner])
            self._real[place.at(0), like.device] = found
        found = self._real[place.at(0), like.device]
        shape = [place.size if d == place.dim else 1 for d in range(like.ndim)]
        return self.write(node, aten.view.default, found, shape) if like.ndim > 1 else found

    def count(self, node: fx.Node, place: Place) -> fx.Node:
        """How many rows are real, as data."""
        more = self.length.more(place)
        return (
            self.write(node, aten.add.Scalar, self.length.node, more)
            if more
            else (self.length.node)
        )

    def number(self, node: fx.Node, now: Any, shorter: Any) -> fx.Node:
        """A number that grows with the length, as data."""
        if type(now) is not int or type(shorter) is not int:
            raise NotPaddedError(f"{key(node.target)} takes a number that follows the length")
        slope = now - shorter
        grown = self.write(node, aten.mul.Scalar, self.length.node, slope)
        found = self.write(node, aten.add.Scalar, grown, now - slope * self.length.bucket.high)
        self.places |= {grown: (), found: ()}
        return found

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)


def unique(places: Sequence[Place], slopes: Sequence[int] | None, val: Any) -> Places:
    """Each place once. Raises NotPaddedError unless they are the dims that follow the length."""
    found = tuple(dict.fromkeys(places))
    dims = {place.dim: place for place in found}
    if len(dims) < len(found):
        raise NotPaddedError("rows of two lengths meet in one dim")
    if slopes is None:
        return found
    for dim, slope in enumerate(slopes):
        place = dims.pop(dim, None)
        each = place.outer * place.inner if place else 0
        if each != slope or (place and place.size != val.shape[dim]):
            raise NotPaddedError(f"dim {dim} of {list(val.shape)} has other rows")
    if dims:
        raise NotPaddedError("has other dims than its rows")
    return found


def is_by_row(target: Any) -> bool:
    """Whether it does not mix rows where a rule says that it is local."""
    name = key(target)
    if name in TABLE:
        return name in BY_ROW or isinstance(TABLE[name], Rule)
    return is_pointwise(target) or has_decomposition(target)


def arguments(node: fx.Node, **defaults: Any) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**defaults, **named_arguments(node)}
