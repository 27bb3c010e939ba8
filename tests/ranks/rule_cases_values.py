"""Contractions, normalisations, reductions and losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rule_case import Cases, b, constant, f, i, ties

aten = torch.ops.aten
CASES = Cases()
add = CASES.add

# contractions
add("linear", F.linear, f(2, 5, 4), f(7, 4), f(7))
add("linear no bias", F.linear, f(5, 4), f(7, 4))
add("linear vector", F.linear, f(4), f(7, 4), f(7))
add("linear of itself", lambda x: F.linear(x, x), f(5, 5))
add("matmul", torch.matmul, f(2, 5, 4), f(2, 4, 7))
add("matmul broadcast", torch.matmul, f(2, 3, 5, 4), f(4, 7))
add("matmul broadcast batch", torch.matmul, f(2, 3, 5, 4), f(3, 4, 7))
add("matmul batch of one", torch.matmul, f(1, 5, 4), f(2, 4, 7))
add("matmul left matrix", torch.matmul, f(5, 4), f(2, 4, 7))
add("matmul vectors", torch.matmul, f(5), f(5))
add("matmul vector right", torch.matmul, f(2, 5, 4), f(4))
add("matmul vector left", torch.matmul, f(4), f(2, 4, 5))
add("matmul square", lambda x: x @ x, f(5, 5))
add("matmul transposed", lambda x: x @ x.transpose(-1, -2), f(2, 5, 4))
add("mm", torch.mm, f(5, 4), f(4, 7))
add("bmm", torch.bmm, f(2, 5, 4), f(2, 4, 7))
add("mv", torch.mv, f(5, 4), f(4))
add("dot", torch.dot, f(5), f(5))
add("addmm", torch.addmm, f(7), f(5, 4), f(4, 7))
add("baddbmm", lambda c, x, y: torch.baddbmm(c, x, y, beta=0.5), f(2, 5, 7), f(2, 5, 4), f(2, 4, 7))
add("einsum", lambda x, y: torch.einsum("bnd,bmd->bnm", x, y), f(2, 5, 4), f(2, 7, 4))
add("einsum heads", lambda x, w: torch.einsum("bnd,hde->bhne", x, w), f(2, 5, 4), f(3, 4, 2))
add("outer product", torch.outer, f(5), f(4))
add("bilinear", lambda x, y, w: F.bilinear(x, y, w), f(5, 2), f(5, 3), f(4, 2, 3))
add("addmv", torch.addmv, f(5), f(5, 4), f(4))

# normalisations
add("layer_norm", lambda x, w, c: F.layer_norm(x, (4,), w, c), f(2, 5, 4), f(4), f(4))
add("layer_norm two dims", lambda x: F.layer_norm(x, (5, 4)), f(2, 5, 4))
add("rms_norm", lambda x, w: F.rms_norm(x, (4,), w), f(2, 5, 4), f(4))
add("group_norm", lambda x, w, c: F.group_norm(x, 2, w, c), f(2, 4, 5), f(4), f(4))
add("group_norm batches", lambda x, w: F.group_norm(x, 2, w), f(5, 4), f(4))
add("group_norm image", lambda x: F.group_norm(x, 3), f(4, 6, 5, 2))
add("instance_norm", lambda x: F.instance_norm(x), f(2, 4, 5))
add("normalize", lambda x: F.normalize(x, dim=-1), f(5, 4))
add("cosine_similarity", lambda x, y: F.cosine_similarity(x, y, -1), f(5, 4), f(5, 4))
add("softmax", lambda x: (x.softmax(-1), x.softmax(0)), f(5, 4))
add("softmax dtype", lambda x: x.softmax(0, dtype=torch.float64), f(5, 4))
add("softmax ties", lambda x: x.softmax(0), ties(2, 5, 4))
add("_softmax", lambda x: aten._softmax.default(x, 0, False), f(5, 4))
add("log_softmax", lambda x: (x.log_softmax(-1), x.log_softmax(0)), f(5, 4))
add("_log_softmax", lambda x: aten._log_softmax.default(x, 0, False), f(5, 4))
add(
    "softmax masked row",
    lambda x: x.masked_fill(torch.arange(5).unsqueeze(1) < 3, -float("inf")).softmax(0),
    f(5, 4),
)
add(
    "log_softmax masked",
    lambda x: x.masked_fill(torch.arange(5).unsqueeze(1) < 3, -float("inf")).log_softmax(0).exp(),
    f(5, 4),
)
add(
    "batch_norm train",
    lambda x, w, c, m, v: F.batch_norm(x, m, v, w, c, training=True),
    f(5, 4),
    f(4),
    f(4),
    constant(4),
    constant(4),
)
add(
    "batch_norm 3d",
    lambda x, m, v: F.batch_norm(x, m, v, training=True, momentum=0.3),
    f(2, 4, 5),
    constant(4),
    constant(4),
)
add("batch_norm no stats", lambda x: F.batch_norm(x, None, None, training=True), f(2, 4, 5))
add(
    "batch_norm eval",
    lambda x, w, c, m, v: F.batch_norm(x, m, v, w, c, training=False),
    f(2, 4, 5),
    f(4),
    f(4),
    constant(4),
    constant(4),
)
add(
    "_native_batch_norm_legit_functional",
    lambda x, m, v: aten._native_batch_norm_legit_functional.default(
        x, None, None, m, v, True, 0.1, 1e-5
    )[0],
    f(5, 4),
    constant(4),
    constant(4),
)

# reductions
REDUCED = {
    "sum": (torch.sum, f),
    "mean": (torch.mean, f),
    "amax": (torch.amax, f),
    "amin": (torch.amin, f),
    "logsumexp": (torch.logsumexp, f),
    "var": (torch.var, f),
    "std": (torch.std, f),
}
for name, (fn, kind) in REDUCED.items():
    add(f"{name} dim", lambda x, fn=fn: fn(x, dim=1), kind(2, 5, 4))
    add(f"{name} keepdim", lambda x, fn=fn: fn(x, dim=-2, keepdim=True), kind(2, 5, 4))
    add(f"{name} dims", lambda x, fn=fn: fn(x, dim=(0, -1)), kind(2, 5, 4))
    add(f"{name} length 1", lambda x, fn=fn: fn(x.expand(3, 5), dim=0), kind(1, 5))
for name in ("sum", "mean", "max", "min", "var", "std", "any", "all", "prod"):
    add(f"{name} all", getattr(torch, name), b(5, 2) if name in ("any", "all") else f(5, 2))
add("sum dtype", lambda x: x.sum(0, dtype=torch.float64), i(9, 5, 2))
add("sum ints", lambda x: x.sum(0), i(9, 5, 2))
add("sum bools", lambda x: x.sum(0), b(5, 2))
add("sum bools to bool", lambda x: x.sum(0, dtype=torch.bool), b(5, 2))
add("mean dtype", lambda x: x.mean(0, dtype=torch.float64), i(9, 5, 2))
add("mean of bools", lambda x: x.mean((0, 1), dtype=torch.float64), b(5, 2))
add("sum empty list", lambda x: x.sum([]), f(5, 2))
add("var.dim", lambda x: aten.var.dim(x, [0], False), f(5, 2))
add("var", lambda x: aten.var.default(x, False), f(5, 2))
add("std.dim", lambda x: aten.std.dim(x, [0], True, True), f(5, 2))
add("std", lambda x: aten.std.default(x, True), f(5, 2))
add("var correction", lambda x: x.var(0, correction=2), f(5, 2))
add("var of no freedom", lambda x: x.var(0, correction=5), f(5, 2))
add("var nan", lambda x: x[:1].var(0), f(5, 2))
add("var_mean", lambda x: torch.var_mean(x, 0), f(5, 2))
add("std_mean", lambda x: torch.std_mean(x, 0), f(5, 2))
add("amax ties", lambda x: x.amax(0), ties(2, 5, 4))
add("amin ties", lambda x: x.amin((0, 1)), ties(2, 5, 4))
add("max ties", lambda x: x.max(), ties(2, 5, 4))
add("min ties", lambda x: x.min(), ties(2, 5, 4))
add("amax ints", lambda x: x.amax(0), i(9, 5, 4))
add("min ints", lambda x: x.min(), i(9, 5, 4))
add("amax bool", lambda x: x.amax(0), b(5, 4))
add(
    "amax infinite",
    lambda x: (
        (x.clamp(min=0) / x.clamp(min=0)).nan_to_num(-float("inf"), neginf=-float("inf")).amax(0)
    ),
    constant(5, 4),
)
add("amax nan", lambda x: (x - 0.5).sqrt().amax(0), f(5, 4))
add("any.dim", lambda x: x.any(0), b(5, 2))
add("any.dims", lambda x: torch.any(x, (0, 1)), b(5, 2))
add("any floats", lambda x: (x > 0.5).to(x.dtype).any(-1, keepdim=True), constant(5, 2))
add("all.dim", lambda x: x.all(0, keepdim=True), b(5, 2))
add("all.dims", lambda x: torch.all(x, (0, -1)), b(5, 2))
add("all uint8", lambda x: x.to(torch.uint8).all(0), b(5, 2))
add(
    "logsumexp infinite", lambda x: x.masked_fill(x > -9, -float("inf")).logsumexp(0).exp(), f(5, 4)
)
add("norm", lambda x: torch.linalg.vector_norm(x, dim=-1), f(5, 4))
add("norm all", lambda x: torch.linalg.vector_norm(x), f(5, 4))
add("norm dim", lambda x: x.norm(dim=0), f(5, 4))
add("norm.ScalarOpt_dim", lambda x: aten.norm.ScalarOpt_dim(x, 2, [1], True), f(5, 4))
add("prod.dim_int", lambda x: x.prod(1), f(5, 4))
add("max.dim", lambda x: x.max(1), f(5, 4))
add("min.dim", lambda x: x.min(-1, keepdim=True), f(5, 4))
add("max.dim ties", lambda x: x.max(1), ties(2, 5, 4))
add("argmax", lambda x: x.argmax(1), f(5, 4))
add("argmax all", lambda x: x.argmax(), f(5, 4))
add("argmin", lambda x: x.argmin(-1, keepdim=True), f(5, 4))
add("cumsum", lambda x: x.cumsum(1), f(5, 4))
add("cumprod", lambda x: x.cumprod(1), f(5, 4))
add("logcumsumexp", lambda x: x.logcumsumexp(-1), f(5, 4))
add("sort", lambda x: x.sort(1), f(5, 4))
add("sort.stable", lambda x: torch.sort(x, dim=1, stable=True), f(5, 4))
add("argsort", lambda x: aten.argsort.default(x, 1), f(5, 4))
add("topk", lambda x: x.topk(2, 1), f(5, 4))
add("median.dim", lambda x: x.median(1), f(5, 4))
add("glu", lambda x: F.glu(x, -1), f(5, 4))
add("glu first", lambda x: F.glu(x, 0), f(4, 5))
add("cummax", lambda x: x.cummax(1), f(5, 4))
add("count_nonzero", lambda x: (x > 0).sum(-1), f(5, 4))
add("softmin", lambda x: F.softmin(x, -1), f(5, 4))
add("diff", lambda x: x.diff(dim=0), f(5, 4))
add("distances by hand", lambda x, y: ((x.unsqueeze(1) - y) ** 2).sum(-1), f(5, 4), f(7, 4))
add("numel of a 0-d", lambda x, y: (x.sum() * y).sum(), f(5), f(4))

# convolutions
add("conv1d", lambda x, w, c: F.conv1d(x, w, c, padding=1), f(5, 4, 7), f(2, 4, 3), f(2))
add("conv1d unbatched", lambda x, w: F.conv1d(x, w), f(4, 7), f(2, 4, 3))
add("conv2d", lambda x, w, c: F.conv2d(x, w, c, stride=2), f(5, 2, 4, 4), f(3, 2, 2, 2), f(3))
add("conv3d", lambda x, w: F.conv3d(x, w), f(4, 2, 3, 3, 3), f(3, 2, 2, 2, 2))
add(
    "convolution",
    lambda x, w: aten.convolution.default(x, w, None, [1], [0], [1], False, [0], 1),
    f(5, 4, 7),
    f(2, 4, 3),
)
add("conv1d groups", lambda x, w: F.conv1d(x, w, groups=2), f(5, 4, 7), f(2, 2, 3))
add("avg_pool1d", lambda x: F.avg_pool1d(x, 2), f(2, 4, 6))
add("max_pool2d", lambda x: F.max_pool2d(x, 2), f(2, 3, 4, 4))
add("adaptive", lambda x: F.adaptive_avg_pool1d(x, 1), f(2, 4, 6))
add("interpolate", lambda x: F.interpolate(x, scale_factor=2), f(2, 4, 5))
add("amax bool empty", lambda x: x.amax(0), b(2, 4))
add("amin bool empty", lambda x: x.amin(0), b(2, 4))
