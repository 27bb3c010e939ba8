"""What keeps padding out of ops that mix rows: masks in front of sums, ignored targets, ends that
are counted from the length. An op that mixes rows, and has no row here, has no form for padding.

    mean(x, [1])             ->  sum(where(real, x, 0), [1]) / length
    cross_entropy(x, y)      ->  cross_entropy(x, where(real, y, ignore_index))
    x[:, -1]                 ->  sum(where(position == length - 1, x, 0), [1])
    pad(labels, (0, 1), v)   ->  pad(where(real, labels, v), (0, 1), v)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from mosaic.graph.lengths import NotPaddedError
from mosaic.graph.ops import key
from mosaic.layout import Place
from mosaic.padding.attention import attention
from mosaic.padding.follow import Follower, Places, arguments, unique
from mosaic.padding.windows import convolution, recurrence, unfold

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2  # of a loss


# --- sums and the like --------------------------------------------------------------------------


def least(val: Tensor) -> Any:
    if val.dtype.is_floating_point:
        return -float("inf")
    return val.dtype != torch.bool and torch.iinfo(val.dtype).min


def most(val: Tensor) -> Any:
    if val.dtype.is_floating_point:
        return float("inf")
    return val.dtype == torch.bool or torch.iinfo(val.dtype).max


def reduced(f: Follower, node: fx.Node, fill: Callable[[Tensor], Any]) -> Any:
    """Padding becomes what changes nothing."""
    kept, mixed = f.split(node)
    if mixed:
        x = node.args[0]
        if key(node.target).startswith("arg") and arguments(node, dim=None)["dim"] is None:
            raise NotPaddedError("counts elements of all rows")
        places = [place for _, place in mixed]
        node.update_arg(0, f.masked(node, x, places, fill(x.meta["val"])))
    return f.checked(node, kept)


def mean(f: Follower, node: fx.Node) -> Any:
    """A sum over what is real, by its count."""
    kept, mixed = f.split(node)
    if not mixed:
        return f.checked(node, kept)
    x, given = node.args[0], arguments(node, dim=None, keepdim=False, dtype=None)
    places, val = [place for _, place in mixed], x.meta["val"]
    dims = range(val.ndim) if given["dim"] is None else [d % val.ndim for d in given["dim"]]
    masked = f.masked(node, x, places, 0)
    options = {"dtype": given["dtype"] or node.meta["val"].dtype}
    total = f.write(node, aten.sum.dim_IntList, masked, [*dims], given["keepdim"], **options)
    count, others = None, prod(val.shape[d] for d in dims)
    for place in places:
        rows = f.count(node, place)
        count = rows if count is None else f.write(node, aten.mul.Tensor, count, rows)
        others //= place.layout.n
    new = f.write(node, aten.div.Tensor, total, f.write(node, aten.mul.Scalar, count, others))
    f.places[new] = f.checked(node, kept)
    f.replace(node, new)
    return f.places[new]


def softmax(f: Follower, node: fx.Node) -> Any:
    """Padding gets no weight."""
    kept, mixed = f.split(node)
    if mixed:
        x = node.args[0]
        places = [place for _, place in mixed]
        node.update_arg(0, f.masked(node, x, places, -float("inf")))
        f.weights.add(node)
        kept += places
    return f.checked(node, kept)


def product(f: Follower, node: fx.Node) -> Any:
    """A matrix product over rows: padding of the first factor becomes 0."""
    kept, mixed = f.split(node)
    first = node.args[0]
    places = [place for x, place in mixed if x is first]
    if mixed and not places:
        raise NotPaddedError(f"{key(node.target)} mixes rows")
    if places and not is_weights(f, first):
        node.update_arg(0, f.masked(node, first, places, 0))
    return f.checked(node, kept)


def is_weights(f: Follower, x: fx.Node) -> bool:
    """Whether it is a softmax in which padding has no weight, in its last dim."""
    if x in f.weights:
        return arguments(x)["dim"] in (-1, x.meta["val"].ndim - 1)
    passes = x.op == "call_function" and hasattr(x.target, "_schema") and key(x.target) in PASSED
    below = x.args[0] if passes else None
    is_alike = below is not None and below.meta["val"].shape[-1:] == x.meta["val"].shape[-1:]
    return is_alike and is_weights(f, below)


PASSED = frozenset("dropout _to_copy clone view _unsafe_view expand".split())


def prefix(f: Follower, node: fx.Node) -> Any:
    """A row of the result is of this row and earlier ones, or of the next, which is cut off."""
    given = arguments(node, prepend=None, append=None)
    if given["append"] is not None or (given["prepend"] and f.places[given["prepend"]]):
        raise NotPaddedError("puts rows behind rows of padding")
    return f.new_rows(node)


# --- losses -------------------------------------------------------------------------------------


def cross_entropy(f: Follower, node: fx.Node) -> Any:
    """Targets of padding are ignored."""
    kept, mixed = f.split(node)
    if not mixed:
        return f.checked(node, kept)
    given = arguments(node, weight=None, reduction=MEAN, ignore_index=-100)
    x, target = given["self"], given["target"]
    classes = 0 if x.meta["val"].ndim == 1 else 1
    places = f.places[target]
    if target.meta["val"].is_floating_point() or given["reduction"] == NONE:
        raise NotPaddedError(f"{key(node.target)} mixes rows")
    if any(place.dim == classes for place in f.places[x]) or not places:
        raise NotPaddedError(f"{key(node.target)} has classes that follow the length")
    ignored = f.masked(node, target, places, given["ignore_index"])
    node.replace_input_with(target, ignored)
    return ()


def elementwise_loss(f: Follower, node: fx.Node) -> Any:
    """The losses of all elements; their mean, or sum, is over what is real."""
    given = arguments(node, reduction=MEAN)
    if given["reduction"] == NONE:
        return f.by_row(node)
    names = [a.name for a in node.target._schema.arguments if not a.kwarg_only]
    args = list(node.args) + [given.get(n, default(node, n)) for n in names[len(node.args) :]]
    args[names.index("reduction")] = NONE
    each = f.write(node, node.target, *args)
    f.places[each] = f.by_row(each)
    if given["reduction"] == MEAN:
        total = f.write(node, aten.mean.default, each)
        f.replace(node, total)
        return mean(f, total)
    total = f.write(node, aten.sum.default, each)
    f.replace(node, total)
    f.places[total] = reduced(f, total, lambda x: 0)
    return f.places[total]


def default(node: fx.Node, name: str) -> Any:
    return next(a.default_value for a in node.target._schema.arguments if a.name == name)


# --- rows by number -----------------------------------------------------------------------------


def of_dim(f: Follower, x: fx.Node, dim: int) -> Place | None:
    """Where rows are in a dim. Raises NotPaddedError where an element is none."""
    place = next((place for place in f.places[x] if place.dim == dim % x.meta["val"].ndim), None)
    if place and (place.outer, place.inner) != (1, 1):
        raise NotPaddedError("counts rows of several that lie in one dim")
    return place


def slice_(f: Follower, node: fx.Node) -> Any:
    """From a row to a row, or to the end, which is the length's."""
    given = arguments(node, dim=0, start=None, end=None, step=1)
    x, dim = given["self"], given["dim"]
    place = of_dim(f, x, dim)
    if place is None:
        if follows_length(f, node) and not f.length.follows[node][0][dim]:
            raise NotPaddedError("has fewer rows than the bucket")
        return follow_others(f, node, x, dim)
    start, end = given["start"] or 0, given["end"]
    more, is_last = f.length.more(place), end is None or end < 0 or end >= place.size
    last = start if is_last or follows_length(f, node) else end
    if given["step"] != 1 or start < 0 or not f.length.needs(max(start, last) - more):
        raise NotPaddedError("takes rows that may be padding")
    return follow_others(f, node, x, dim)


def follows_length(f: Follower, node: fx.Node) -> bool:
    return "end" in f.length.numbers.get(node, {})


def follow_others(f: Follower, node: fx.Node, x: fx.Node, dim: int) -> Places:
    """The dims of an op along another one; those of that one follow the length of themselves."""
    dim %= x.meta["val"].ndim
    return f.new_rows(node, [place for place in f.places[x] if place.dim != dim])


def select(f: Follower, node: fx.Node) -> Any:
    """A row from the start, or from the end, which is the length's."""
    x, dim, index = node.args
    place = of_dim(f, x, dim)
    if place is None:
        return f.by_row(node)
    more = f.length.more(place)
    rest = [p.at(p.dim - (p.dim > place.dim)) for p in f.places[x] if p is not place]
    if not f.length.needs((index + 1 if index >= 0 else -index) - more):
        raise NotPaddedError("takes a row that may be padding")
    if index >= 0:
        return f.checked(node, rest)
    new = nth_from_end(f, node, x, place, index)
    f.places[new] = f.checked(node, rest)
    f.replace(node, new)
    return f.places[new]


def nth_from_end(f: Follower, node: fx.Node, x: fx.Node, place: Place, index: int) -> fx.Node:
    """The only row that is left of a sum."""
    val = x.meta["val"]
    at = f.write(node, aten.arange.default, place.size, device=val.device)
    wanted = f.write(node, aten.add.Scalar, f.length.node, f.length.more(place) + index)
    is_it = f.write(node, aten.eq.Tensor, at, wanted)
    shape = [place.size if d == place.dim else 1 for d in range(val.ndim)]
    is_it = f.write(node, aten.view.default, is_it, shape)
    alone = f.write(node, aten.where.ScalarOther, is_it, x, 0)
    found = f.write(node, aten.sum.dim_IntList, alone, [place.dim], dtype=val.dtype)
    return found


def cat(f: Follower, node: fx.Node) -> Any:
    """Along the rows: constants in front, and one behind them, which comes at once."""
    given = arguments(node, dim=0)
    parts = given["tensors"]
    dim = given["dim"] % node.meta["val"].ndim
    long = [i for i, x in enumerate(parts) if of_dim(f, x, dim)]
    if not long:
        return f.by_row(node)
    behind = parts[long[0] + 1 :]
    others = [place for x in parts for place in f.places[x] if place.dim != dim]
    if len(long) > 1 or any(x.meta["val"].shape[dim] > 1 for x in behind) or len(behind) > 1:
        raise NotPaddedError("cat puts rows behind rows of padding")
    places = f.new_rows(node, others)
    if behind:
        last = next(place for place in places if place.dim == dim)
        behind_rows(f, node, behind[0], last, places)
    return places


def behind_rows(f: Follower, node: fx.Node, row: fx.Node, last: Place, places: Places) -> None:
    """The row behind the real ones is ``row``."""
    like, after = node.meta["val"], node.next
    at = f.write(after, aten.arange.default, last.size, device=like.device)
    end = f.write(after, aten.add.Scalar, f.length.node, f.length.more(last) - 1)
    is_before = f.write(after, aten.lt.Tensor, at, end)
    shape = [last.size if d == last.dim else 1 for d in range(like.ndim)]
    is_before = f.write(after, aten.view.default, is_before, shape)
    new = f.write(after, aten.where.self, is_before, node, row)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    f.places[new] = places


def pad(f: Follower, node: fx.Node) -> Any:
    """Behind the rows: what is padded with stands in their padding, too."""
    given = arguments(node, mode="constant", value=None)
    x, pads, value = given["self"], given["pad"], given["value"] or 0
    ndim = x.meta["val"].ndim
    grown = [ndim - 1 - i // 2 for i, n in enumerate(pads) if n]
    along = [place for place in f.places[x] if place.dim in grown]
    if along and given["mode"] != "constant":
        raise NotPaddedError("pads with other rows")
    behind = []
    for place in along:
        of_dim(f, x, place.dim)
        if pads[2 * (ndim - 1 - place.dim) + 1] > 0:
            behind.append(place)
    if behind:
        node.update_arg(0, f.masked(node, x, behind, value))
    return f.new_rows(node, [place for place in f.places[x] if place.dim not in grown])


def broadcast(f: Follower, node: fx.Node) -> Any:
    """``broadcast_tensors``, of tensors that all hold the rows."""
    found = []
    for x, val, slopes in zip(node.args[0], node.meta["val"], f.length.follows[node], strict=True):
        shift = val.ndim - x.meta["val"].ndim
        found.append(unique([p.at(p.dim + shift) for p in f.places[x]], slopes, val))
    return found


def made(f: Follower, node: fx.Node) -> Any:
    """A tensor of one number, or of positions from 0 (or any other constant) on."""
    given = arguments(node, step=1)
    if given["step"] != 1:
        raise NotPaddedError("counts in steps")
    return f.new_rows(node)


def expand(f: Follower, node: fx.Node) -> Any:
    """Or ``repeat``: new rows are all alike."""
    x = node.args[0]
    shift = node.meta["val"].ndim - x.meta["val"].ndim
    if "repeats" in arguments(node) and node not in f.length.numbers:
        return f.by_row(node)
    for d, slope in enumerate(f.length.follows[node][0]):
        is_new = slope and all(place.dim + shift != d for place in f.places[x])
        if is_new and d >= shift and x.meta["val"].shape[d - shift] > 1:
            raise NotPaddedError("repeats several rows")
    return f.new_rows(node, [place.at(place.dim + shift) for place in f.places[x]])


# --- lookups ------------------------------------------------------------------------------------


def embedding(f: Follower, node: fx.Node) -> Any:
    """Padding looks the first entry up: its own number may be none of the table's."""
    weight, indices = node.args[0], node.args[1]
    if f.places[weight]:
        raise NotPaddedError("looks up rows by number")
    if indices.op != "placeholder":
        node.update_arg(1, within(f, node, indices, weight.meta["val"].shape[0]))
    return f.by_row(node)


def index(f: Follower, node: fx.Node) -> Any:
    """``x[i, j]``: rows are looked up by number; padding among the numbers looks the first up."""
    x, indices = node.args
    new, looked_up = list(indices), {d for d, i in enumerate(indices) if i is not None}
    for d in looked_up:
        if indices[d].meta["val"].dtype == torch.bool:
            raise NotPaddedError("selects by a mask")
        place = of_dim(f, x, d)
        if place is not None and not is_from_start(f, indices[d]):
            raise NotPaddedError("looks up rows by numbers that may count from the end")
        new[d] = within(f, node, indices[d], x.meta["val"].shape[d])
    kept = [f.probed(node, x, place) for place in f.places[x] if place.dim not in looked_up]
    of_indices = [indices[d] for d in looked_up]
    kept += [f.probed(node, i, place) for i in of_indices for place in f.places[i]]
    if None in kept:
        raise NotPaddedError("index mixes rows")
    node.update_arg(1, new)
    return f.checked(node, kept)


def within(f: Follower, node: fx.Node, indices: fx.Node, size: int) -> fx.Node:
    """Numbers of rows that are in ``0 ... size - 1`` for padding, too."""
    known = f.constants(indices)
    if known is not None and is_from_start(f, indices) and bool((known < size).all()):
        return indices
    return f.masked(node, indices, f.places[indices], 0)


def is_from_start(f: Follower, indices: fx.Node) -> bool:
    """Whether they are known to be no less than 0: positions, in any form."""
    known = f.constants(indices)
    return known is not None and bool((known >= 0).all())


def gather(f: Follower, node: fx.Node) -> Any:
    """Rows are looked up by number, from the start."""
    x, dim, indices = node.args[:3]
    other = [place for place in f.places[x] if place.dim != dim % x.meta["val"].ndim]
    places = f.places[indices]
    node.update_arg(2, f.masked(node, indices, places, 0))
    if any(place not in places for place in other):
        raise NotPaddedError("gather takes some rows of a dim")
    return unique(places, f.length.follows[node][0], node.meta["val"])


REDUCED: dict[str, Callable[[Tensor], Any]] = {
    **dict.fromkeys("sum sum.dim_IntList nansum any any.dim any.dims".split(), lambda x: 0),
    **dict.fromkeys("prod prod.dim_int all all.dim all.dims".split(), lambda x: 1),
    **dict.fromkeys("amax max max.dim argmax logsumexp".split(), least),
    **dict.fromkeys("amin min min.dim argmin".split(), most),
}
ELEMENTWISE = (
    "mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss kl_div binary_cross_entropy "
    "binary_cross_entropy_with_logits".split()
)

HANDLERS: dict[str, Callable[[Follower, fx.Node], Any]] = {
    **{name: partial(reduced, fill=fill) for name, fill in REDUCED.items()},
    **dict.fromkeys(ELEMENTWISE, elementwise_loss),
    **dict.fromkeys("matmul mm bmm mv dot".split(), product),
    **dict.fromkeys("full zeros ones new_zeros new_ones new_full".split(), made),
    **dict.fromkeys("arange arange.start arange.start_step".split(), made),
    "mean": mean,
    "mean.dim": mean,
    "softmax.int": softmax,
    "_softmax": softmax,
    "cumsum": prefix,
    "diff": prefix,
    "cross_entropy_loss": cross_entropy,
    "nll_loss_nd": cross_entropy,
    "scaled_dot_product_attention": attention,
    "slice.Tensor": slice_,
    "select.int": select,
    "cat": cat,
    "pad": pad,
    "constant_pad_nd": pad,
    "broadcast_tensors": broadcast,
    "expand": expand,
    "repeat": expand,
    "embedding": embedding,
    "index.Tensor": index,
    "gather": gather,
    **dict.fromkeys("conv1d conv2d conv3d convolution".split(), convolution),
    "unfold": unfold,
    "mosaic::recurrence": recurrence,
}
