"""Writes by index, and what is looked up along the axis by few indices."""

from __future__ import annotations

import torch
from rule_case import Cases, b, f, i, ties

aten = torch.ops.aten
CASES = Cases()
add = CASES.add

add(
    "index_put outer accumulate",
    lambda x, j, k: x.index_put((j, k), x.new_ones(7, 2).cumsum(0), accumulate=True).sin(),
    f(5, 4), i(5, 7, 1), i(4, 2),
)  # fmt: skip


def put(x, value, *indices, accumulate=False):
    return aten.index_put.default(x, indices, value, accumulate).sin()


# looked up along the axis: few rows are asked of their owners, many are cut anew
add("index few", lambda x, j: x[j].sin(), f(11, 2), i(11, 3))
add("index few last", lambda x, j: x[:, j].sin(), f(2, 11), i(11, 3))
add("index few negative", lambda x, j: x[j - 11].sin(), f(11, 2), i(11, 3))
add("index few 2d", lambda x, j: x[:, j].sin(), f(2, 11, 4), i(11, 1, 3))
add("index few pair", lambda x, j, k: x[j, k].sin(), f(11, 4), i(11, 3), i(4, 3))
add("index few apart", lambda x, j, k: x[j, :, k].sin(), f(11, 2, 4), i(11, 3), i(4, 3))
add("index few empty shard", lambda x, j: x[j].sin(), f(4, 2), i(4, 1))
add("index few bools", lambda x, j: ~(x > 0)[j], f(11, 2), i(11, 3))
add("index few twice", lambda x, j: x[torch.stack([j, j])].sin(), f(11, 2), i(11, 1))
add("index list", lambda x: x[:, [0, 3, -1]].sin(), f(2, 11, 4))
add("index list many", lambda x: x[[4, 0, 3, 3, 1, 2]].sin(), f(5, 2))
add("index list of both", lambda x: x[[0, 2], [1, 3]].sin(), f(11, 7))
add("index none at all", lambda x: x[x.new_zeros(0).long()].sin(), f(5, 2))
add("index permuted", lambda x, j: (x[j] * x).sin(), f(7, 2), i(7, 7))
add("index merged few", lambda x, j: x.reshape(24, 2)[j].sin(), f(3, 8, 2), i(24, 3))
add("index_select few", lambda x, j: x.index_select(-1, j).sin(), f(2, 11), i(11, 3))
add("gather few", lambda x, j: x.gather(0, j).sin(), f(11, 4), i(11, 2, 4))
add("gather few part", lambda x, j: x.gather(1, j).sin(), f(3, 11), i(11, 2, 3))
add(
    "gather last token",
    lambda x, j: x.gather(1, j[:, None, None].expand(-1, 1, 2)).sin(),
    f(3, 7, 2),
    i(7, 3),
)

# index_put
add("index_put", lambda x, v, j: put(x, v, j), f(5, 2), f(3, 2), i(1, 3))
add("index_put rows", lambda x, v: put(x, v, torch.tensor([0, 4, -2])), f(5, 2), f(3, 2))
add("index_put other dim", lambda x, v: put(x, v, None, torch.tensor([0, 2])), f(5, 4), f(5, 2))
add("index_put broadcast", lambda x, v: put(x, v, torch.tensor([1, 3])), f(5, 2), f(2))
add(
    "index_put accumulate", lambda x, v, j: put(x, v, j, accumulate=True), f(5, 2), f(7, 2), i(5, 7)
)
add(
    "index_put pair",
    lambda x, v: put(x, v, torch.tensor([1, 3]), torch.tensor([0, 2])),
    f(5, 4),
    f(2),
)
add(
    "index_put apart",
    lambda x, v: put(x, v, torch.tensor([1, 3]), None, torch.tensor([0, 2])),
    f(5, 2, 4),
    f(2, 2),
)
add("index_put middle", lambda x, v: put(x, v, None, torch.tensor([1, 3])), f(2, 5, 4), f(2, 2, 4))
add("index_put ints", lambda x, j: x.index_put((j,), x.new_full((), 3)) * 2, i(9, 5, 2), i(5, 3))
add("index_put mask", lambda x, m: put(x, x.new_full((), 2.0), m), f(5, 2), b(5))
add("index_put mask of all", lambda x, v, m: put(x, v[0], m), f(5, 2), f(1), b(5, 2))


def turns():
    return torch.tensor([True, False, False, True, True])


add("index_put rows by a mask", lambda x, v: put(x, v, turns()), f(5, 2), f(3, 2))
add(
    "index_put rows by a mask of two",
    lambda x, v: put(x, v, None, turns().view(5, 1) & torch.tensor([False, True])),
    f(3, 5, 2, 4),
    f(3, 3, 4),
)
add(
    "index_put rows by a mask, accumulate",
    lambda x, v: put(x, v, None, turns(), accumulate=True),
    f(2, 5, 4),
    f(3, 4),
)
add(
    "index_put rows by a mask that is cut",
    lambda x, v, j: put(x, v, (j == 0) & turns()),  # j is 0 everywhere
    f(5, 2),
    f(3, 2),
    i(1, 5),
)
add(
    "index_put no row by a mask that is cut",
    lambda x, v, j: put(x, v, j > 0),
    f(5, 2),
    f(0, 2),
    i(1, 5),
)
add("index_put no row", lambda x, v: put(x, v, turns() & False), f(5, 2), f(0, 2))
add("index_put mask of the last", lambda x, m: put(x, x.new_ones(1), None, m), f(5, 4), b(4))
add("index_put mask accumulate", lambda x, v, m: put(x, v, m, accumulate=True), f(5, 2), f(1), b(5))
add(
    "index_put into zeros",
    lambda v, j: put(v.new_zeros(4, 2), v, j, accumulate=True),
    f(5, 2),
    i(4, 5),
)

# rows of a dim
add("index_add", lambda x, y, j: x.index_add(0, j, y, alpha=2).sin(), f(5, 2), f(7, 2), i(5, 7))
add("index_add last", lambda x, y, j: x.index_add(-1, j, y).sin(), f(5, 4), f(5, 3), i(4, 3))
add(
    "index_add into zeros",
    lambda y, j: y.new_zeros(4, 2).index_add(0, j, y).sin(),
    f(5, 2),
    i(4, 5),
)
add("index_copy", lambda x, y: x.index_copy(0, torch.tensor([3, 0, 1]), y).sin(), f(5, 2), f(3, 2))
add("index_fill", lambda x, j: x.index_fill(0, j, 2.0).sin(), f(5, 2), i(5, 3))
add("index_fill tensor", lambda x, v, j: x.index_fill(1, j, v).sin(), f(5, 4), f(), i(4, 2))

# scatter
add("scatter", lambda x, y: x.scatter(0, torch.tensor([[0, 1], [4, 3]]), y).sin(), f(5, 2), f(2, 2))
add("scatter last", lambda x, y, j: x.scatter(1, j, y).sin(), f(5, 4), f(5, 1), i(4, 5, 1))
add("scatter value", lambda x, j: x.scatter(1, j, 2.0).sin(), f(5, 4), i(4, 5, 3))
add("scatter value part", lambda x, j: x.scatter(1, j, 2.0).sin(), f(5, 4), i(4, 3, 3))
add(
    "scatter.value_reduce",
    lambda x, j: aten.scatter.value_reduce(x.detach(), 1, j, 2, reduce="multiply"),
    f(5, 4),
    i(4, 5, 3),
)
add("scatter_add", lambda x, y, j: x.scatter_add(0, j, y).sin(), f(5, 2), f(7, 2), i(5, 7, 2))
add("scatter_add last", lambda x, y, j: x.scatter_add(1, j, y).sin(), f(5, 4), f(5, 3), i(4, 5, 3))
add(
    "scatter_add into zeros",
    lambda y, j: y.new_zeros(4, 2).scatter_add(0, j, y).sin(),
    f(5, 2),
    i(4, 5, 2),
)
add(
    "scatter_reduce",
    lambda x, y, j: x.scatter_reduce(1, j, y, "amax").sin(),
    f(5, 4),
    f(5, 3),
    i(4, 5, 3),
)
add(
    "scatter_reduce mean",
    lambda x, y, j: x.scatter_reduce(1, j, y, "mean", include_self=False).sin(),
    f(5, 4),
    f(5, 3),
    i(4, 5, 3),
)


# routing of experts: the choice of a token is its own
def routed(x, w, e):
    scores = (x @ w).softmax(-1)
    top, chosen = scores.topk(2, -1)
    mask = torch.zeros_like(scores).scatter(-1, chosen, top)
    return torch.einsum("te,teo->to", mask, torch.einsum("td,edo->teo", x, e))


add("routed", routed, f(5, 4), f(4, 3), f(3, 4, 2))
add(
    "tokens of each expert",
    lambda x: x.new_zeros(4).scatter_add(0, x.argmax(-1), x.new_ones(5)),
    f(5, 4),
)


def grouped(x, w, back):
    """As transformers' experts in groups, each with a scale in place of its own weights."""
    k, experts = 2, w.shape[0]
    top, chosen = x[:, :experts].softmax(-1).topk(k, -1)
    ids, order = chosen.reshape(-1).sort()
    rows = (x[order // k] * w[ids]).sin() * top.reshape(-1)[order].unsqueeze(-1)
    return back(x, rows, order, k)


def by_argsort(x, e):
    order = e.argsort()
    return x[order].sin()[order.argsort()] * x


def counted(x):
    """How many tokens each expert has is another matter: it is for all ranks."""
    ids, order = x.argmax(-1).sort()
    return torch.histc(ids.double(), bins=4, min=0, max=3) * x[order].sin()[order.argsort()]


def put_back(x, rows, order, k):
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return rows[inverse].view(len(x), k, -1).sum(1)


def added_back(x, rows, order, k):
    return x.new_zeros(len(x), rows.shape[1]).index_add(0, order // k, rows)


add("experts grouped", lambda x, w: grouped(x, w, put_back), f(7, 4), f(3, 4))
add("experts grouped on few", lambda x, w: grouped(x, w, added_back), f(4, 4), f(3, 4))
add("experts by argsort", by_argsort, f(7, 2), i(3, 7))
add("experts counted", counted, f(7, 4))
add(
    "experts out of order",
    lambda x, w: grouped(x, w, lambda x, rows, order, k: rows.cumsum(0)),
    f(7, 4),
    f(3, 4),
)

# the largest along the axis
add("max.dim first", lambda x: x.max(0), f(5, 4))
add("max.dim first ties", lambda x: x.max(0), ties(2, 5, 4))
add("min.dim first ties", lambda x: x.min(0, keepdim=True), ties(2, 5, 4))
add("max.dim ints", lambda x: (x * 1).max(0), i(3, 5, 4))
add("max.dim of a half", lambda x: x.sin().float().max(0), ties(3, 5, 4))
add("argmax first", lambda x: x.argmax(0), f(5, 4))
add("argmax first ties", lambda x: (x.argmax(0), x.argmin(0, keepdim=True)), ties(2, 7, 3))
add("argmax all ties", lambda x: (x.argmax(), x.argmin()), ties(2, 5, 4))
add("argmax nan", lambda x: ((x - 0.6).sqrt().argmax(0), (x - 0.6).sqrt().argmin()), ties(2, 7, 3))
add("argmax merged", lambda x: x.reshape(10, 2).argmax(0), ties(3, 2, 5, 2))
