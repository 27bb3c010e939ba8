"""Routing of experts: tokens are sorted by their expert, worked on in groups and put back.

    order = expert.argsort()                      every rank sorts, counts and groups its own
    y = grouped_mm(x[order // k], w, counts)      tokens: where a token stands among the others
    out = y[inverse of order]                     is nobody's business once they are put back

Only a region that is closed is done so: each use of what is in sorted order must be one that gives
every token its own, whatever the order, until it is back in its place. Else the sort is gathered.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from mosaic.graph.ops import is_pointwise, key
from mosaic.layout import Place
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.probing import Prober
from mosaic.partition.values import Call, Value

aten = torch.ops.aten
GROUPED = {"_grouped_mm", "transformers::grouped_mm_fallback"}
#: Work on each row by itself, if they leave dim 0 alone.
ROWWISE = {"split.Tensor", "split_with_sizes", "unsqueeze", "squeeze.dim", "slice.Tensor"}

# What a node of the region holds.
ROWS = "rows in sorted order"
ORDER = "where each of them stood"
TOKENS = "the token of each"
COUNTS = "numbers of rows, of this rank"
INVERSE = "where each row went"
BACK = "rows in their place"


@dataclass
class Region:
    """The nodes behind a sort, and what each holds."""

    sort: fx.Node
    kinds: dict[fx.Node, str]
    choices: int = 1  # how many experts a token has: places in ``order // choices``

    @property
    def size(self) -> int:
        return self.sort.args[0].meta["val"].shape[0]

    def kind(self, x: Any) -> str:
        return self.kinds.get(x, "") if isinstance(x, fx.Node) else ""


def region_of(sort: fx.Node) -> Region | None:
    """All that is done in sorted order until the rows are put back; None if it gets elsewhere."""
    ids = sort.args[0]
    if ids.meta["val"].ndim != 1 or ids.meta["val"].is_floating_point():
        return None
    region = Region(sort, {})
    several = "argsort" not in str(sort.target)
    region.kinds[sort] = "" if several else ORDER
    todo = set(sort.users)
    for node in iter_after(sort):
        if node not in todo:
            continue
        kind = region_kind(region, node)
        if kind is None:
            return None
        region.kinds[node] = kind
        if kind != BACK:
            todo |= set(node.users)
    return region if BACK in region.kinds.values() else None


def iter_after(node: fx.Node) -> Iterator[fx.Node]:
    while node.op != "root":
        node = node.next
        yield node


def region_kind(region: Region, node: fx.Node) -> str | None:
    """What a user of the region's nodes gives; None if it depends on the order."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        if node.args[0] is region.sort:
            return (ROWS, ORDER)[node.args[1]]
        return region.kind(node.args[0])
    if not hasattr(node.target, "_schema"):
        return None
    name, kinds = key(node.target), [region.kind(n) for n in node.all_input_nodes]
    check = CHECKS.get(name)
    if check is not None:
        return check(region, node)
    if name in GROUPED:
        return ROWS if [region.kind(a) for a in node.args[:3]] == [ROWS, "", COUNTS] else None
    if set(kinds) == {COUNTS} and is_pointwise(node.target):
        return COUNTS
    if ROWS not in kinds or set(kinds) - {ROWS, ""}:
        return None
    if name in ROWWISE:
        return ROWS if keeps_rows(node) else None
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    return ROWS if is_pointwise(node.target) and aligned(region, node) else None


def keeps_rows(node: fx.Node) -> bool:
    """Whether dim 0 is left alone."""
    call = Call(node.target, node.args, node.kwargs, None, node)
    x = node.args[0].meta["val"]
    ndim = x.ndim + ("unsqueeze" in call.name)
    return call["dim"] % ndim != 0


def aligned(region: Region, node: fx.Node) -> bool:
    """Whether every operand has either the rows as its first dim, or one for all of them."""
    ndim = node.meta["val"].ndim
    for operand in node.all_input_nodes:
        x = operand.meta["val"]
        first = x.shape[0] if x.ndim == ndim else 1
        if first != (region.size if region.kind(operand) == ROWS else 1):
            return False
    return True


def divided(region: Region, node: fx.Node) -> str | None:
    k = node.args[1]
    if region.kind(node.args[0]) != ORDER or not isinstance(k, int) or k < 1 or region.size % k:
        return None
    if region.choices not in (1, k) or node.kwargs.get("rounding_mode", "floor") != "floor":
        return None
    region.choices = k
    return TOKENS


def indexed(region: Region, node: fx.Node) -> str | None:
    x, indices = node.args[:2]
    if len(indices) != 1:
        return None
    size, pair = x.meta["val"].shape[0], (region.kind(x), region.kind(indices[0]))
    if pair == (ROWS, INVERSE):
        return BACK
    if pair == ("", ORDER) or pair == ("", TOKENS):
        k = 1 if pair[1] == ORDER else region.choices
        return ROWS if size * k == region.size else None
    return ROWS if pair == ("", ROWS) and size != region.size else None  # an expert's bias


def added_back(region: Region, node: fx.Node) -> str | None:
    """``out.index_add(0, tokens, rows)``."""
    x, dim, tokens, rows = node.args[:4]
    kinds = [region.kind(a) for a in (x, tokens, rows)]
    fits = dim == 0 and x.meta["val"].shape[0] * region.choices == region.size
    return BACK if fits and kinds == ["", TOKENS, ROWS] else None


def counted(region: Region, node: fx.Node) -> str | None:
    x = node.args[0]
    return COUNTS if region.kind(x) == ROWS and x.meta["val"].ndim == 1 else None


def summed(region: Region, node: fx.Node) -> str | None:
    return COUNTS if region.kind(node.args[0]) == COUNTS else None


def blank(region: Region, node: fx.Node) -> str | None:
    return ORDER if region.kind(node.args[0]) == ORDER else None


def inverted(region: Region, node: fx.Node) -> str | None:
    """``inverse[order] = arange(n)``."""
    x, indices, values = node.args[:3]
    accumulates = len(node.args) > 3 and node.args[3]
    fits = region.kind(x) == ORDER and [region.kind(i) for i in indices] == [ORDER]
    counting = (
        getattr(values, "target", None) is aten.arange.default and values.args[0] == region.size
    )
    return INVERSE if fits and counting and not accumulates else None


def sorted_again(region: Region, node: fx.Node) -> str | None:
    return INVERSE if region.kind(node.args[0]) == ORDER else None


CHECKS: dict[str, Callable[[Region, fx.Node], str | None]] = {
    "floor_divide": divided,
    "div.Tensor_mode": divided,
    "index.Tensor": indexed,
    "index_add": added_back,
    "histc": counted,
    "bincount": counted,
    "cumsum": summed,
    "empty_like": blank,
    "zeros_like": blank,
    "index_put": inverted,
    "argsort": sorted_again,
}


# --- the local program --------------------------------------------------------------------------


def sort(s: ShardingInterpreter, c: Call, along: Callable[[ShardingInterpreter, Call], Any]) -> Any:
    """A sort of ids along the axis whose order nobody sees; ``along``: any other."""
    x = c.x
    if x.place is None or x.ndim != 1 or isinstance(s, Prober) or c.like.target is not c.target:
        return along(s, c)
    region = region_of(c.like)
    if region is None or x.cut.inner % region.choices:
        return along(s, c)
    s.routed.update({n: (region, x.place) for n in region.kinds if n is not c.like})
    return s.emit(c, x.place)


def follow(s: ShardingInterpreter, node: fx.Node) -> Any:
    """A node of a region: the same op on this rank's rows."""
    region, place = s.routed[node]
    kind, c = region.kinds[node], s.call_of(node)
    if kind == COUNTS:
        return s.emit(c, None, enter=False)
    if "index_add" in c.name:
        tokens = replace(place, inner=place.inner // region.choices)
        return s.emit(c, tokens, self=s.at(c.x, tokens))
    if kind == INVERSE and "index_put" in c.name:
        rows = s.local([region.size], place)[0]
        counting = s.call(c, aten.arange.default, rows, device=c.x.val.device)
        return s.emit(c, place, values=counting)
    if "index" in c.name and region.kind(node.args[0]) == "":
        return s.emit(c, place, self=looked_up(s, c, region, place, node.args[1][0]))
    return s.emit(c, place)


def looked_up(s: ShardingInterpreter, c: Call, region: Region, place: Place, by: fx.Node) -> Value:
    """What is indexed: rows, or tokens, as they are cut; the experts' own are whole."""
    x = c.x
    if region.kind(by) == ROWS:
        return s.gather(x, "of all experts", c.like)
    k = region.choices if region.kind(by) == TOKENS else 1
    return s.at(x, replace(place, inner=place.inner // k))
