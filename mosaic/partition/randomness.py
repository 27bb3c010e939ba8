"""Random ops: a dropout mask is a function of (seed, global index); the rest is drawn once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mosaic.api.errors import UnsupportedError
from mosaic.graph.source import where
from mosaic.layout import Layout, Place, Shard
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.values import Call, Value
from mosaic.runtime import rng
from mosaic.runtime.comm import broadcast

aten = torch.ops.aten


def dropout(s: ShardingInterpreter, c: Call) -> Value:
    """The same elements are dropped for every p. Works on a whole tensor and on a part alike."""
    x, p = c["input"], float(c["p"])
    if not c["train"] or p == 0:
        return s.call(c, aten.clone.default, x)
    drawn = (s.seed(c), x, s.site(c.like), indices(s, x), p)
    keep = s.function(c, keep_mask, drawn, x.val, x.place)
    return s.call(c, aten.mul.Tensor, x, keep)


def indices(s: ShardingInterpreter, x: Value) -> str:
    """How every dim of x is cut, as strings that a graph can hold."""
    rank, group = (s.emitter.rank, s.emitter.group) if s.emitter else (0, "")
    shards = [
        Shard(x.cut.at(0), rank, group)
        if x.place and x.cut.dim == dim
        else Shard(Place(Layout.whole(size, 1), 0), 0, "")
        for dim, size in enumerate(x.shape)
    ]
    return ";".join(shard.encode() for shard in shards)


def keep_mask(seed: Tensor, x: Tensor, site: int, shards: str, p: float) -> Tensor:
    """0 where an element is dropped, 1 / (1 - p) where it is kept."""
    vectors = [rng.global_indices(Shard.decode(t), x.device) for t in shards.split(";") if t]
    return rng.uniform_keep(seed, site, vectors, p, x.dtype)


#: Their result has no gradient, so one rank's draw can be everybody's.
DRAWS = frozenset(
    "bernoulli binomial cauchy exponential geometric log_normal multinomial normal "
    "normal_functional poisson rand rand_like randint randint_like randn randn_like randperm "
    "uniform".split()
)

#: Of their operand they take the form only: sizes, and strides, in whose order they draw.
FORMS = frozenset(
    "cauchy exponential geometric log_normal normal_functional rand_like randint_like randn_like "
    "uniform".split()
)


def drawn_once(s: ShardingInterpreter, c: Call) -> Any:
    """rand, randn, bernoulli, multinomial ...: drawn whole, and rank 0's draw is everybody's."""
    if not is_draw(c):
        return computed_with_draws(s, c)
    if name_of(c) in FORMS:
        x = c.x.val
        form = {"dtype": x.dtype, "device": x.device}
        blank = s.call(c, aten.empty_strided.default, list(x.shape), list(x.stride()), **form)
        drawn = s.emit(c, None, enter=False, self=blank)
    else:
        if any(v.place for v in c.tensors()):
            c = s.with_whole_operands(c, "draws random numbers for the whole tensor")
        drawn = s.emit(c, None, enter=False)
    if not s.emitter or s.axis.p == 1:
        return drawn
    return s.function(c, broadcast, (drawn, s.emitter.group), c.val)


def name_of(c: Call) -> str:
    name: str = c.target._schema.name
    return name.removeprefix("aten::")


def is_draw(c: Call) -> bool:
    return name_of(c) in DRAWS


def is_certain(c: Call) -> bool:
    """Whether an op that may draw numbers draws none here: evaluation, or nothing to drop."""
    shares = [float(c.bound[n] or 0) for n in ("p", "dropout", "dropout_p") if n in c.bound]
    trains = c.bound.get("train", c.bound.get("training", True))
    return not is_draw(c) and (not trains or (bool(shares) and max(shares) == 0))


def computed_with_draws(s: ShardingInterpreter, c: Call) -> Any:
    """lstm, rrelu, alpha_dropout ...: a gradient flows through them; a broadcast would stop it."""
    if is_certain(c):
        return s.gather_for(c, "has no rule")
    if s.axis.p == 1:
        return s.emit(c, c.tensors()[0].place)
    raise UnsupportedError(
        f"{c.name} draws random numbers, and every rank would draw others",
        where=where(c.like),
        fix="use dropout or attention with dropout_p, which Mosaic draws alike on all ranks",
    )
