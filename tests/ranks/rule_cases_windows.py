"""What slides over an axis: strides, dilations, paddings; windows longer than a shard."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rule_case import Cases, f, ties

aten = torch.ops.aten
CASES = Cases()
add = CASES.add

# convolutions, as signals and as images
add("conv1d same", lambda x, w, c: F.conv1d(x, w, c, padding=1), f(1, 2, 7), f(3, 2, 3), f(3))
add("conv1d valid", lambda x, w: F.conv1d(x, w), f(1, 2, 11), f(3, 2, 4))
add("conv1d patches", lambda x, w: F.conv1d(x, w, stride=3), f(1, 2, 12), f(3, 2, 3))
add("conv1d stride", lambda x, w: F.conv1d(x, w, stride=2, padding=2), f(1, 2, 9), f(3, 2, 3))
add("conv1d dilated", lambda x, w: F.conv1d(x, w, dilation=3, padding=3), f(1, 2, 9), f(2, 2, 3))
add("conv1d long", lambda x, w: F.conv1d(x, w, padding=6), f(1, 1, 4), f(2, 1, 7))
add(
    "conv1d causal",
    lambda x, w: F.conv1d(x, w, padding=3, groups=2)[..., :-3] * x,
    f(1, 2, 7),
    f(2, 1, 4),
)
add("conv1d padded", lambda x, w: F.conv1d(F.pad(x, (2, 0)), w) * x, f(1, 2, 7), f(2, 2, 3))
add("conv1d of a slice", lambda x, w: F.conv1d(x[..., 2:9], w, padding=1), f(1, 2, 11), f(2, 2, 3))
add("conv1d of words", lambda x, w: F.conv1d(x.mT, w, padding=1).mT + x, f(1, 7, 2), f(2, 2, 3))
add("conv1d pointwise", lambda x, w: F.conv1d(x, w), f(2, 4, 7), f(2, 4, 1))
add("conv1d no batch", lambda x, w: F.conv1d(x, w, padding=1), f(2, 7), f(2, 2, 3))
add("conv1d of few", lambda x, w: F.conv1d(x, w, padding=1), f(1, 2, 2), f(2, 2, 3))
add("conv1d one output", lambda x, w: F.conv1d(x, w), f(1, 2, 5), f(2, 2, 5))
add(
    "conv1d twice",
    lambda x, w: F.conv1d(F.conv1d(x, w, padding=1).relu(), w, stride=2),
    f(1, 2, 9),
    f(2, 2, 3),
)
add("conv1d.padding", lambda x, w: F.conv1d(x, w, padding="same"), f(1, 2, 7), f(2, 2, 3))
add("conv2d.padding", lambda x, w: F.conv2d(x, w, padding="valid"), f(1, 2, 5, 4), f(2, 2, 3, 1))
add(
    "conv3d.padding",
    lambda x, w: F.conv3d(x, w, padding="same"),
    f(1, 1, 5, 4, 3),
    f(1, 1, 3, 3, 1),
)
add("conv2d same", lambda x, w, c: F.conv2d(x, w, c, padding=1), f(1, 2, 7, 5), f(2, 2, 3, 3), f(2))
add("conv2d patches", lambda x, w: F.conv2d(x, w, stride=(2, 3)), f(1, 1, 8, 9), f(2, 1, 2, 3))
add(
    "conv2d mixed",
    lambda x, w: F.conv2d(x, w, stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    f(1, 2, 7, 5),
    f(2, 2, 3, 2),
)
add("conv3d same", lambda x, w: F.conv3d(x, w, padding=1), f(1, 1, 5, 4, 3), f(1, 1, 3, 3, 3))
add(
    "conv flat tokens",
    lambda x, w: F.conv2d(x.mT.reshape(1, 2, 4, 3), w, padding=1).flatten(2).mT,
    f(1, 12, 2),
    f(2, 2, 3, 3),
)

# pools
add("avg_pool1d along", lambda x: F.avg_pool1d(x, 3, stride=2, padding=1), f(1, 2, 9))
add("avg_pool1d bare", lambda x: F.avg_pool1d(x, 3, padding=1, count_include_pad=False), f(1, 4, 6))
add("avg_pool2d", lambda x: F.avg_pool2d(x, 2), f(1, 2, 6, 4))
add("avg_pool2d free", lambda x: F.avg_pool2d(x, 3, 1, 1), f(4, 2, 3, 3))
add("avg_pool3d", lambda x: F.avg_pool3d(x, 2, 1), f(1, 2, 4, 3, 3))
add("max_pool1d", lambda x: F.max_pool1d(x, 3, 2, 1), f(1, 2, 9))
add("max_pool2d along", lambda x: F.max_pool2d(x, 3, 1, 1), f(1, 4, 7, 5))
add("max_pool3d", lambda x: F.max_pool3d(x, 2), f(1, 2, 4, 4, 2))
add("max_pool2d_with_indices", lambda x: F.max_pool2d(x, 2, return_indices=True), f(4, 3, 4, 4))
add("max_pool3d_with_indices", lambda x: F.max_pool3d(x, 2, return_indices=True), f(4, 1, 2, 4, 2))
add("max_pool1d ties", lambda x: F.max_pool1d(x, 3, 1, 1), ties(2, 1, 1, 9))
add("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 3), f(2, 2, 9))
add("adaptive_avg_pool1d uneven", lambda x: F.adaptive_avg_pool1d(x, 4), f(4, 2, 9))
add("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (3, 2)), f(4, 2, 6, 4))
add("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, (2, 2, 1)), f(1, 2, 4, 4, 2))
add("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 3), f(4, 2, 6))
add("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, 2), f(4, 2, 4, 4))
add("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 2), f(4, 1, 2, 2, 4))

# windows as a dim
add("unfold overlapping", lambda x: x.unfold(0, 3, 1).sin(), f(7, 2))
add("unfold apart", lambda x: x.unfold(-1, 2, 3).sin(), f(2, 11))
add("unfold mean", lambda x: x.unfold(1, 4, 2).mean(-1), f(2, 9, 2))
