"""Views, joins, cuts and lookups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rule_case import Cases, b, f, i

aten = torch.ops.aten
CASES = Cases()
add = CASES.add

# reshapes: the axis merged with others, split, torn
add("view merge", lambda x: aten.view.default(x, [10, 4]).sin(), f(2, 5, 4))
add("view merge last", lambda x: x.view(2, -1).sin(), f(2, 5, 4))
add("view flat", lambda x: x.reshape(-1).sin(), f(2, 5, 4))
add("view and back", lambda x: x.reshape(10, 4).sin().reshape(2, 5, 4), f(2, 5, 4))
add("view split", lambda x: x.view(3, 4, 2).sin(), f(12, 2))
add("view tears", lambda x: x.reshape(5, 4).sin(), f(4, 5))
add("view regroups", lambda x: x.reshape(2, 2, 5).sin(), f(4, 5))
add("view transposed", lambda x: x.transpose(0, 1).reshape(-1, 2).sin(), f(2, 5, 2))
add("view ones", lambda x: x.view(1, 5, 1, 2).sin(), f(5, 2))
add("view a one", lambda x: x.view(5, 2).sin(), f(5, 1, 2))
add("view empty", lambda x: x.reshape(0, 10).sin(), f(5, 0, 2))
add("_unsafe_view", lambda x: aten._unsafe_view.default(x, [10, 4]).sin(), f(2, 5, 4))
add("unflatten.int", lambda x: aten.unflatten.int(x, 1, [2, 5]).sin(), f(2, 10))
add("flatten", lambda x: aten.flatten.using_ints(x, 0, 1).sin(), f(2, 5, 4))
add("flatten negative", lambda x: x.flatten(-2).sin(), f(2, 5, 4))
add("heads", lambda x: x.view(2, 5, 2, 2).transpose(1, 2).reshape(4, 5, 2).sin(), f(2, 5, 4))
add("windows", lambda x: x.view(2, 2, 4, 1, 2).transpose(2, 3).reshape(4, 4, 2).sin(), f(2, 8, 2))
add("pooled", lambda x: x.view(2, 6, 2, 3).mean(2), f(2, 12, 3))
add("merged then sliced", lambda x: x.reshape(10, 4)[3:8].sin(), f(5, 2, 4))
add("merged with outer then sliced", lambda x: x.reshape(10, 4)[3:8].sin(), f(2, 5, 4))
add("merged then summed", lambda x: x.reshape(10, 4).sum(0), f(2, 5, 4))
add("merged then max", lambda x: x.reshape(10, 4).amax(0), f(2, 5, 4))
add("merged then flipped", lambda x: x.reshape(10, 4).flip(0).sin(), f(2, 5, 4))
add("merged then tril", lambda x: x.reshape(4, 10).tril(), f(4, 5, 2))
add("merged then cat", lambda x, y: torch.cat([x.reshape(10, 2), y]).sin(), f(5, 2, 2), f(3, 2))
add("merged then cat outer", lambda x: torch.cat([x.reshape(10, 2), x[0]]).sin(), f(2, 5, 2))
add("merged then stacked", lambda x: torch.stack([x.reshape(10, 2)] * 2).sin(), f(2, 5, 2))
add("merged then softmax", lambda x: x.reshape(10, 4).softmax(0), f(2, 5, 4))
add("merged then indexed", lambda x, j: x.reshape(10, 4)[j].sin(), f(2, 5, 4), i(10, 3))
add("merged pad", lambda x: F.pad(x.reshape(10, 4), (0, 0, 1, 2)).sin(), f(2, 5, 4))
add("merged add", lambda x, y: x.reshape(10, 4) + y, f(2, 5, 4), f(10, 4))

# expand, repeat, order of dims
add("expand", lambda x: aten.expand.default(x, [3, 5, 2]).sin(), f(5, 2))
add("expand a one", lambda x: x.expand(5, 4).sin(), f(5, 1))
add("expand minus one", lambda x: x.expand(3, -1, 4).sin(), f(5, 1))
add("repeat", lambda x: x.repeat(2, 3).sin(), f(5, 2))
add("repeat new dim", lambda x: x.repeat(3, 1, 2).sin(), f(5, 2))
add("repeat zero", lambda x: x.repeat(0, 2).sin(), f(5, 2))
add("repeat then sum", lambda x, w: (x.repeat(2, 1) * w).sum(0), f(5, 2), f(10, 2))
add("repeat_interleave", lambda x: x.repeat_interleave(3, 0).sin(), f(5, 2))
add("repeat_interleave last", lambda x: x.repeat_interleave(2, -1).sin(), f(5, 2))
add("repeat_interleave flat", lambda x: x.repeat_interleave(2).sin(), f(5, 2))
add("repeat_interleave then slice", lambda x: x.repeat_interleave(2, 0)[1:5].sin(), f(5, 2))
add("permute", lambda x: x.permute(2, 0, 1).sin(), f(2, 5, 4))
add("permute negative", lambda x: x.permute(-1, 0, -2).sin(), f(2, 5, 4))
add("transpose", lambda x: x.transpose(-1, 0).sin(), f(2, 5, 4))
add("t", lambda x: x.t().sin(), f(5, 2))
add("t of a vector", lambda x: x.t().sin(), f(5))
add(
    "unsqueeze",
    lambda x: (x.unsqueeze(0).sin(), x.unsqueeze(1).sin(), x.unsqueeze(-1).sin()),
    f(5, 2),
)
add("squeeze", lambda x: x.squeeze().sin(), f(1, 5, 1, 2))
add(
    "squeeze.dim",
    lambda x: (x.squeeze(0).sin(), x.squeeze(-1).sin(), x.squeeze(1).sin()),
    f(1, 5, 1),
)
add("squeeze.dims", lambda x: x.squeeze((0, 2)).sin(), f(1, 5, 1, 2))
add("flip", lambda x: (x.flip(0).sin(), x.flip(-1).cos()), f(5, 2))
add("roll", lambda x: x.roll(2, 0).sin(), f(5, 2))
add("roll negative", lambda x: x.roll((-1, 7), (0, 1)).sin(), f(5, 4))
add("roll nothing", lambda x: x.roll(0, 0).sin(), f(5, 2))
add("roll flat", lambda x: x.roll(3).sin(), f(5, 2))

# cuts
add("select", lambda x: (x.select(0, 3).sin(), x.select(1, -1).sin()), f(5, 2))
add("select int", lambda x: (x[3] * 2, x[:, -1] * 2), i(9, 5, 2))
add("select bool", lambda x: ~x[-1], b(5, 2))
add("slice", lambda x: x[1:4].sin(), f(5, 2))
add("slice negative", lambda x: x[-3:-1].sin(), f(5, 2))
add("slice step", lambda x: (x[1::2].sin(), x[:, ::3].sin()), f(11, 7))
add("slice beyond", lambda x: x[2:99].sin(), f(5, 2))
add("slice empty", lambda x: x[4:2].sin(), f(5, 2))
add("slice empty and cat", lambda x: torch.cat([x[0:0], x, x[5:5]]).sin(), f(5, 2))
add("slice empty sum", lambda x: x[4:2].sum(0) + x.sum(0), f(5, 2))
add("slice of a slice", lambda x: x[1:][::2][1:].sin(), f(11, 2))
add("shifted", lambda x: (x[1:] - x[:-1]).sin(), f(7, 2))
add("shifted ints", lambda x, y: x[1:] * y[:-1], f(7, 2), i(9, 7, 2))
add("steps differ", lambda x: x[::2] * x[1::2], f(10, 2))
add("halves", lambda x: torch.cat([-x[..., 2:], x[..., :2]], -1).sin(), f(5, 4))
add("narrow", lambda x: aten.narrow.default(x, 0, 1, 3).sin(), f(5, 2))
add("narrow negative", lambda x: x.narrow(-1, -2, 2).sin(), f(5, 4))
add("split.Tensor", lambda x: [y.sin() for y in x.split(2, 0)], f(5, 2))
add("split last", lambda x: [y.sin() for y in x.split(2, -1)], f(5, 4))
add("split_with_sizes", lambda x: [y.sin() for y in x.split([1, 3, 1], 0)], f(5, 2))
add("chunk", lambda x: [y.sin() for y in x.chunk(3, 0)], f(5, 4))
add("chunk last", lambda x: [y.sin() for y in x.chunk(2, -1)], f(5, 4))
add("unbind", lambda x: [y.sin() for y in x.unbind(0)], f(3, 5))
add("unbind negative", lambda x: [y.sin() for y in x.unbind(-1)], f(5, 3))
add("unbind ints", lambda x: [y * 2 for y in x.unbind(0)], i(9, 3, 5))
add("part of a split", lambda x: x.split([2, 3], 0)[1].sin(), f(5, 2))

# joins
add("cat", lambda x, y: torch.cat([x, y]).sin(), f(5, 2), f(4, 2))
add("cat last", lambda x, y: torch.cat([x, y], -1).sin(), f(5, 2), f(5, 3))
add("cat same", lambda x: torch.cat([x, x], 0).sin(), f(5, 2))
add("cat three", lambda x, y: torch.cat([y, x, y * 2], 0).sin(), f(5, 2), f(1, 2))
add("cat legacy empty", lambda x, y: torch.cat([x, y]).sin(), f(5, 2), f(0))
add("cat parts", lambda x: torch.cat([x[3:], x[:3]]) * x, f(5, 2))
add("cat ints", lambda x, y: torch.cat([x, y]) * 2, i(9, 5, 2), i(9, 4, 2))
add("cat promotes", lambda x, y: torch.cat([x, y]) * 2, f(5, 2), i(9, 4, 2))
add("cat cls", lambda x, c: torch.cat([c.expand(2, 1, 4), x], 1).sin(), f(2, 5, 4), f(1, 1, 4))
add("stack", lambda x, y: torch.stack([x, y]).sin(), f(5, 2), f(5, 2))
add("stack last", lambda x, y: torch.stack([x, y], -1).sin(), f(5, 2), f(5, 2))
add("stack shifted", lambda x: torch.stack([x[1:], x[:-1]], 1).sin(), f(5, 2))

# padding
add("pad", lambda x: F.pad(x, (1, 2, 2, 1)).sin(), f(5, 4))
add("pad value", lambda x: F.pad(x, (0, 0, 2, 0), value=3.0).sin(), f(5, 4))
add("pad negative", lambda x: F.pad(x, (0, 0, -1, -1)).sin(), f(5, 4))
add("pad mixed", lambda x: F.pad(x, (-1, 1, 2, -1)).sin(), f(5, 4))
add("pad all away", lambda x: F.pad(x, (0, 0, -3, -2)).sin(), f(5, 4))
add("constant_pad_nd", lambda x: aten.constant_pad_nd.default(x, [0, 1, 1, 0], 2.0).sin(), f(5, 4))
add("pad reflect", lambda x: F.pad(x, (1, 1), mode="reflect").sin(), f(2, 4, 5))
add("pad circular", lambda x: F.pad(x, (1, 1), mode="circular").sin(), f(2, 4, 5))
add("pad replicate", lambda x: F.pad(x, (1, 1), mode="replicate").sin(), f(2, 4, 5))
add("pad ints", lambda x: F.pad(x, (1, 1), value=7) * 2, i(9, 5))
add("pad bool", lambda x: ~F.pad(x, (1, 1), value=True), b(5))

# writes
add("slice_scatter", lambda x, y: aten.slice_scatter.default(x, y, 0, 1, 4).sin(), f(5, 2), f(3, 2))
add(
    "slice_scatter other",
    lambda x, y: aten.slice_scatter.default(x, y, 1, 1, 3).sin(),
    f(5, 4),
    f(5, 2),
)
add(
    "slice_scatter step",
    lambda x, y: aten.slice_scatter.default(x, y, 0, 0, 5, 2).sin(),
    f(5, 2),
    f(3, 2),
)
add(
    "slice_scatter whole",
    lambda x, y: aten.slice_scatter.default(x, y, 0, 0, 5).sin(),
    f(5, 2),
    f(5, 2),
)
add(
    "slice_scatter nothing",
    lambda x, y: aten.slice_scatter.default(x, y, 0, 3, 3).sin(),
    f(5, 2),
    f(0, 2),
)
add("select_scatter", lambda x, y: aten.select_scatter.default(x, y, 0, 3).sin(), f(5, 2), f(2))
add(
    "select_scatter last",
    lambda x, y: aten.select_scatter.default(x, y, -1, -1).sin(),
    f(5, 2),
    f(5),
)
add(
    "select_scatter ints",
    lambda x, y: aten.select_scatter.default(x, y, 0, 1) * 2,
    i(9, 5, 2),
    i(9, 2),
)


def assigned(x, y):
    z = x.clone()
    z[:, 1] = 0
    z[1:3] = z[1:3] * 2
    z[3] = y
    z.mul_(x)
    return z


add("assigned", assigned, f(5, 4), f(4))

# lookups
add("index", lambda x, j: x[j].sin(), f(5, 2), i(5, 7))
add("index last", lambda x, j: x[:, j].sin(), f(5, 4), i(4, 7))
add("index 2d", lambda x, j: x[:, j].sin(), f(5, 4), i(4, 7, 2))
add("index pair", lambda x, j, k: x[j, k].sin(), f(5, 4), i(5, 7), i(4, 7))
add("index outer", lambda x, j, k: x[j, k].sin(), f(5, 4), i(5, 7, 1), i(4, 2))
add("index apart", lambda x, j, k: x[j, :, k].sin(), f(5, 2, 4), i(5, 7), i(4, 7))
add("index none first", lambda x, j: x[None, j].sin(), f(5, 2), i(5, 7))
add("index middle", lambda x, j: x[:, j].sin(), f(2, 5, 4), i(5, 3))
add("index negative", lambda x, j: x[j - 5].sin(), f(5, 2), i(5, 7))
add("index table", lambda x, j: x[j].sin(), i(9, 5, 2), i(5, 7, 3))
add("index_select", lambda x, j: x.index_select(0, j).sin(), f(5, 2), i(5, 7))
add("index_select last", lambda x, j: x.index_select(-1, j).sin(), f(5, 4), i(4, 7))
add("gather", lambda x, j: x.gather(1, j).sin(), f(5, 4), i(4, 5, 3))
add("gather first", lambda x, j: x.gather(0, j).sin(), f(5, 4), i(5, 7, 4))
add("gather part", lambda x, j: x.gather(-1, j).sin(), f(5, 4), i(4, 3, 4))
add("take_along", lambda x, j: torch.take_along_dim(x, j, 1).sin(), f(5, 4), i(4, 5, 1))
add("embedding", lambda w, j: F.embedding(j, w).sin(), f(9, 4), i(9, 2, 5))
add(
    "embedding by frequency",
    lambda w, j: F.embedding(j, w, scale_grad_by_freq=True).sin(),
    f(9, 4),
    i(9, 2, 5),
)
add("embedding padding", lambda w, j: F.embedding(j, w, padding_idx=3).sin(), f(9, 4), i(9, 2, 5))
add("one_hot", lambda j: F.one_hot(j, 4) * 2, i(4, 5, 2))
add("tril", lambda x: x.tril().sin(), f(5, 7))
add("triu", lambda x: x.triu(1).sin(), f(2, 5, 4))
add("tril below", lambda x: x.tril(-2).sin(), f(2, 5, 7))
add("tril bool", lambda x: ~x.tril(), b(5, 5))
add("tril batched", lambda x: x.tril(1) * 2, i(9, 3, 4, 5))
add("diagonal", lambda x: x.diagonal().sin(), f(5, 5))
add("meshgrid", lambda x, y: [z.sin() for z in torch.meshgrid(x, y, indexing="ij")], f(5), f(4))
add("movedim", lambda x: x.movedim(0, -1).sin(), f(5, 2, 4))
add("unfold", lambda x: x.unfold(0, 2, 2).sin(), f(6, 2))
add("masked select free", lambda x, m: torch.where(m, x, x.new_zeros(())).sum(0), f(5, 2), b(5, 2))
add("index bool", lambda x, m: (x * m.to(x.dtype)).sum(), f(5, 2), b(5, 2))
