"""What each pass does to a tiny program: one diff per pass of PIPELINE and LOWERING.

All sizes differ, so that a swapped dim shows: batch 2, 11 rows, embed 8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

sdpa = F.scaled_dot_product_attention


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


# --- programs -----------------------------------------------------------------------------------


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.repeat_interleave(2, dim=1)
    v = v.repeat_interleave(2, dim=1)
    y = sdpa(q, k, v)
    return y[:, :, :6] * y[:, :, :6]


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / 2 + mask
    return torch.softmax(scores, dim=-1) @ v


def averaged(x: Tensor, positions: Tensor, weight: Tensor) -> Tensor:
    y = F.linear(x + positions, weight)
    y = sdpa(y, y, y, is_causal=True)
    return y.mean(dim=1)


def of_averaged() -> tuple[Tensor, ...]:
    return torch.randn(2, 11, 8).double(), random(11, 8), random(5, 8)


def table(x: Tensor) -> Tensor:
    cells = x.reshape(22, 3, 8)
    cells = sdpa(cells, cells, cells)
    rows = cells.reshape(2, 11, 3, 8).transpose(1, 2)
    return sdpa(rows[:, :, 6:], rows[:, :, :6], rows[:, :, :6])


def differences(x: Tensor) -> Tensor:
    y = sdpa(x, x, x)
    return y[:, 1:] - y[:, :-1]


def attended(x: Tensor) -> Tensor:
    return sdpa(x, x, x)


def two_sums(x: Tensor) -> Tensor:
    y = sdpa(x, x, x)
    return y.sum(dim=1) / y.exp().sum(dim=1)


def projected(x: Tensor, inner: Tensor, outer: Tensor, bias: Tensor) -> Tensor:
    y = F.linear(x, inner)
    return F.linear(sdpa(y, y, y), outer, bias)


# --- PIPELINE -----------------------------------------------------------------------------------


def test_normalize(planned, check):
    plan = planned(grouped, random(2, 4, 11, 3), random(2, 2, 11, 3), random(2, 2, 11, 3))
    check(plan.diffs["normalize"], """""")


def test_raise_attention(planned, check):
    plan = planned(written_out, random(2, 11, 8), random(2, 9, 8), random(2, 9, 5), random(11, 9))
    check(plan.diffs["raise_attention"], """""")


def test_infer_axes(planned, axes, check):
    planned(table, random(2, 11, 3, 8))
    found = axes["infer_axes"]
    check(f"{found.name}: {found.layout} {found.method} seeds {found.seeds}", """""")


def test_propagate(planned, check):
    plan = planned(table, random(2, 11, 3, 8))
    check(plan.diffs["propagate"], """""")


def test_analyze_masks(planned, check):
    plan = planned(averaged, *of_averaged())
    check(plan.diffs["analyze_masks"], """""")


def test_choose_method(planned, check):
    plan = planned(table, random(2, 11, 3, 8))
    check(plan.diffs["choose_method"], """""")


def test_assign_layouts(planned, axes, check):
    planned(averaged, *of_averaged())
    check(f"{axes['choose_method'].layout}\n{axes['assign_layouts'].layout}", """""")


def test_partition(planned, check):
    plan = planned(averaged, *of_averaged())
    check(plan.diffs["partition"], """""")


def test_rewrite_attention(planned, check):
    plan = planned(averaged, *of_averaged())
    check(plan.diffs["rewrite_attention"], """""")


# --- LOWERING -----------------------------------------------------------------------------------


def test_lower_collectives(planned, check):
    plan = planned(differences, random(2, 11, 8))
    check(plan.diffs["lower_collectives"], """""")


def test_lower_attention(planned, check):
    plan = planned(attended, torch.randn(2, 5, 11, 8).double())
    check(plan.diffs["lower_attention"], """""")


def test_overlap_waits_late(planned, check):
    plan = planned(two_sums, torch.randn(2, 11, 8).double())
    check(plan.diffs["overlap"], """""")


def test_overlap_reduces_gradients_together(planned, check):
    plan = planned(projected, torch.randn(2, 11, 8).double(), random(6, 8), random(5, 6), random(5))
    check(plan.diffs["overlap backward"], """""")
