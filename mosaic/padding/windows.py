"""Windows that slide over rows, and recurrences: a real row is made of real rows before it.

conv1d(x, w, padding=3)     ->  conv1d(where(real, x, 0), w, padding=3)
recurrence(q, k, v, ...)    as it is: padding comes behind all that is real
"""

from __future__ import annotations

from typing import Any

from torch import fx

from mosaic.graph.lengths import NotPaddedError
from mosaic.graph.ops import key
from mosaic.layout import Place
from mosaic.padding.follow import Follower, Places, arguments, unique
from mosaic.recurrences.call import Recurrence


def convolution(f: Follower, node: fx.Node) -> Any:
    """What stands behind the rows, zeros, stands in their padding, too."""
    given = arguments(node, stride=[1], transposed=False)
    x, weight = given["input"], given["weight"]
    first = x.meta["val"].ndim - (weight.meta["val"].ndim - 2)
    along = [place for place in f.places[x] if place.dim >= first]
    if not along:
        return f.by_row(node)
    strides = {spread(given["stride"], place.dim - first) for place in along}
    if strides != {1} or given["transposed"] or len(f.operands(node)) > len(f.places[x]):
        raise NotPaddedError(f"{key(node.target)} does not go row by row")
    kept = [f.probed(node, x, place) for place in f.places[x] if place not in along]
    if None in kept or any((place.outer, place.inner) != (1, 1) for place in along):
        raise NotPaddedError(f"{key(node.target)} mixes rows")
    node.update_arg(0, f.masked(node, x, along, 0))
    return f.new_rows(node, kept)


def spread(sizes: Any, dim: int) -> int:
    """One number for each dim, or one for all."""
    return int(sizes if isinstance(sizes, int) else sizes[dim if len(sizes) > 1 else 0])


def unfold(f: Follower, node: fx.Node) -> Places:
    """Windows of real rows; those with padding in them are padding."""
    given = arguments(node)
    x, dim = given["self"], given["dimension"] % given["self"].meta["val"].ndim
    along = [place for place in f.places[x] if place.dim == dim]
    if any(given["step"] != 1 or (place.outer, place.inner) != (1, 1) for place in along):
        raise NotPaddedError("unfold does not go row by row")
    return f.new_rows(node, [place for place in f.places[x] if place.dim != dim])


def recurrence(f: Follower, node: fx.Node) -> list[Places]:
    """The state goes from the first row on, and that behind the last one is nobody's."""
    tensors, call = node.args
    known = Recurrence.decode(call)
    for name, x in zip(known.tensors, tensors, strict=True):
        dim = known.kind.rows.get(name)
        own = () if dim is None else (f.length.place(dim),)
        if f.places[x] != own:
            raise NotPaddedError("a recurrence mixes rows of another dim")
    if any(user.args[1] == 1 and user.users for user in node.users):
        raise NotPaddedError("the last state of a recurrence is read, behind rows of padding")
    follows, val = f.length.follows[node], node.meta["val"]
    out: Place = f.length.place(known.kind.out)
    return [unique([out], follows[0], val[0]), unique([], follows[1], val[1])]
