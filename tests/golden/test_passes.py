"""What each pass does to a tiny program: one diff per pass of PIPELINE and LOWERING.

All sizes differ, so that a swapped dim shows: batch 2, 11 rows, embed 8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.losses import heads

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


def einsums(x: Tensor, padding: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", x, x) / 2
    scores = scores.masked_fill(padding[:, None, None, :], -1e9)
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, dim=-1), x)


def averaged(x: Tensor, positions: Tensor, weight: Tensor) -> Tensor:
    y = F.linear(x + positions, weight)
    y = sdpa(y, y, y, is_causal=True)
    return y.mean(dim=1)


def of_averaged() -> tuple[Tensor, ...]:
    return torch.randn(2, 11, 8).double(), random(11, 8), random(5, 8)


def of_labels(x: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(sdpa(x, x, x), head)
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, 17), labels[:, 1:].reshape(-1))
    return loss, logits


def table(x: Tensor) -> Tensor:
    cells = x.reshape(22, 3, 8)
    cells = sdpa(cells, cells, cells)
    rows = cells.reshape(2, 11, 3, 8).transpose(1, 2)
    return sdpa(rows[:, :, 6:], rows[:, :, :6], rows[:, :, :6])


def broken(x: Tensor, ids: Tensor) -> Tensor:
    same = ids[:, :, None] == ids[:, None]
    x = sdpa(x, x, x, same)
    torch._dynamo.graph_break()
    return x.masked_fill(same.all(2)[..., None], 0)


def differences(x: Tensor) -> Tensor:
    y = sdpa(x, x, x)
    return y[:, 1:] - y[:, :-1]


def attended(x: Tensor) -> Tensor:
    return sdpa(x, x, x)


def masked(x: Tensor) -> Tensor:
    behind = torch.arange(11)[:, None] - torch.arange(11)
    return sdpa(x, x, x, (behind >= 0) & (behind < 3))


def two_sums(x: Tensor) -> Tensor:
    y = sdpa(x, x, x)
    return y.sum(dim=1) / y.exp().sum(dim=1)


def projected(x: Tensor, inner: Tensor, outer: Tensor, bias: Tensor) -> Tensor:
    y = F.linear(x, inner)
    return F.linear(sdpa(y, y, y), outer, bias)


# --- PIPELINE -----------------------------------------------------------------------------------


def test_normalize(planned, check):
    plan = planned(grouped, random(2, 4, 11, 3), random(2, 2, 11, 3), random(2, 2, 11, 3))
    check(
        plan.diffs["normalize"],
        """\
 q: f64[2, 4, 11, 3]
-# k = k.repeat_interleave(2, dim=1)
-repeat_interleave: f64[2, 4, 11, 3] = repeat_interleave(k, 2, 1)
-# v = v.repeat_interleave(2, dim=1)
-repeat_interleave_1: f64[2, 4, 11, 3] = repeat_interleave(v, 2, 1)
 # y = sdpa(q, k, v)
-sdpa: f64[2, 4, 11, 3] = sdpa(q, repeat_interleave, repeat_interleave_1)
+sdpa: f64[2, 4, 11, 3] = sdpa(q, k, v, enable_gqa=True)
 # return y[:, :, :6] * y[:, :, :6]
 slice_1: f64[2, 4, 6, 3] = sdpa[:, :, :6]
-slice_2: f64[2, 4, 6, 3] = sdpa[:, :, :6]
-mul: f64[2, 4, 6, 3] = mul(slice_1, slice_2)
+mul: f64[2, 4, 6, 3] = mul(slice_1, slice_1)
 return [mul]
""",
    )


def test_raise_attention_of_einsums(planned, check):
    """Padding by a finite number: a row that sees no key averages all of them."""
    plan = planned(einsums, random(2, 11, 3, 4), torch.zeros(2, 11, dtype=torch.bool))
    check(
        plan.diffs["raise_attention"],
        """\
 padding: b8[2, 11]
-# scores = torch.einsum("bqhd,bkhd->bhqk", x, x) / 2
-einsum: f64[2, 3, 11, 11] = einsum('bqhd,bkhd->bhqk', [x, x])
-div: f64[2, 3, 11, 11] = div(einsum, 2)
 # scores = scores.masked_fill(padding[:, None, None, :], -1e9)
...
 unsqueeze_1: b8[2, 1, 1, 11] = unsqueeze(unsqueeze, 2)
-masked_fill: f64[2, 3, 11, 11] = masked_fill(div, unsqueeze_1, -1e+09)
+transpose: f64[2, 3, 11, 4] = transpose(x, -3, -2)
+logical_not: b8[2, 1, 1, 11] = logical_not(unsqueeze_1)
+any_1: b8[2, 1, 1, 1] = any(logical_not, -1, True)
+where: f64[2, 3, 11, 4] = where(any_1, transpose, 0)
+logical_not_1: b8[2, 1, 1, 1] = logical_not(any_1)
+logical_or: b8[2, 1, 1, 11] = logical_or(logical_not, logical_not_1)
 # return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, dim=-1), x)
-softmax: f64[2, 3, 11, 11] = softmax(masked_fill, -1)
-einsum_1: f64[2, 11, 3, 4] = einsum('bhqk,bkhd->bqhd', [softmax, x])
-return [einsum_1]
+attention: f64[2, 3, 11, 4] = sdpa(where, transpose, transpose, logical_or, scale=0.5)
+transpose_3: f64[2, 11, 3, 4] = transpose(attention, -3, -2)
+return [transpose_3]
""",
    )


def test_raise_attention(planned, check):
    plan = planned(written_out, random(2, 11, 8), random(2, 9, 8), random(2, 9, 5), random(11, 9))
    check(
        plan.diffs["raise_attention"],
        """\
 v: f64[2, 9, 5]
-# scores = q @ k.transpose(-2, -1) / 2 + mask
-transpose: f64[2, 8, 9] = transpose(k, -2, -1)
-matmul: f64[2, 11, 9] = matmul(q, transpose)
-div: f64[2, 11, 9] = div(matmul, 2)
-add: f64[2, 11, 9] = add(div, mask)
+unsqueeze: f64[2, 1, 11, 8] = unsqueeze(q, 1)
+unsqueeze_1: f64[2, 1, 9, 8] = unsqueeze(k, 1)
+unsqueeze_2: f64[2, 1, 9, 5] = unsqueeze(v, 1)
 # return torch.softmax(scores, dim=-1) @ v
-softmax: f64[2, 11, 9] = softmax(add, -1)
-matmul_1: f64[2, 11, 5] = matmul(softmax, v)
-return [matmul_1]
+attention: f64[2, 1, 11, 5] = sdpa(unsqueeze, unsqueeze_1, unsqueeze_2, mask, scale=0.5)
+gt: b8[11, 9] = gt(mask, -inf)
+any_1: b8[11, 1] = any(gt, -1, True)
+sum_1: f64[2, 1, 5] = sum(v, [-2], True)
+sum_2: f64[2, 11, 1] = sum(q, [-1], True)
+sum_3: f64[2, 1, 1] = sum(k, [-2, -1], True)
+add_1: f64[2, 11, 5] = add(sum_1, sum_2)
+add_2: f64[2, 11, 5] = add(add_1, sum_3)
+logical_not: b8[11, 1] = logical_not(any_1)
+unsqueeze_3: f64[2, 1, 11, 5] = unsqueeze(add_2, 1)
+_to_copy: f64[11, 1] = _to_copy(logical_not)
+masked_fill: f64[11, 1] = masked_fill(_to_copy, logical_not, nan)
+mul: f64[2, 1, 11, 5] = mul(masked_fill, unsqueeze_3)
+where: f64[2, 1, 11, 5] = where(logical_not, mul, attention)
+squeeze: f64[2, 11, 5] = squeeze(where, 1)
+return [squeeze]
""",
    )


def test_defer_outputs(planned, check):
    """Behind the break the mask is ``ids`` and three steps: both are what the first graph gives."""
    plan = planned(broken, random(2, 11, 8), torch.zeros(2, 11, dtype=torch.int64))
    check(
        plan.diffs["defer_outputs"],
        """\
 x: f64[2, 11, 8]
-# same = ids[:, :, None] == ids[:, None]
-unsqueeze: i64[2, 11, 1] = unsqueeze(ids, 2)
-unsqueeze_1: i64[2, 1, 11] = unsqueeze(ids, 1)
-eq: b8[2, 11, 11] = eq(unsqueeze, unsqueeze_1)
 # x = sdpa(x, x, x, same)
 sdpa: f64[2, 11, 8] = mosaic.sdpa(x, x, x, query_documents=ids, key_documents=ids)  # documents
-return [sdpa, eq]
+return [sdpa, ids]
""",
    )


def test_infer_axes(planned, axes, check):
    planned(table, random(2, 11, 3, 8))
    found = axes["infer_axes"]
    check(
        f"{found.name}: {found.layout} {type(found.method).__name__} seeds {found.seeds}",
        """\
x.1: 11=0:3|3:6|6:9|9:11 Auto seeds (('x', 1),)
""",
    )


def test_propagate(planned, check):
    plan = planned(table, random(2, 11, 3, 8))
    check(
        plan.diffs["propagate"],
        """\
-x: f64[2, 11, 3, 8]
+x: f64[2, 11/sp, 3, 8]
 # cells = x.reshape(22, 3, 8)
-view: f64[22, 3, 8] = view(x)
+view: f64[2*11/sp, 3, 8] = view(x)
 # cells = sdpa(cells, cells, cells)
-sdpa: f64[22, 3, 8] = sdpa(view, view, view)
+sdpa: f64[2*11/sp, 3, 8] = sdpa(view, view, view)
 # rows = cells.reshape(2, 11, 3, 8).transpose(1, 2)
-view_1: f64[2, 11, 3, 8] = view(sdpa)
-transpose: f64[2, 3, 11, 8] = transpose(view_1, 1, 2)
+view_1: f64[2, 11/sp, 3, 8] = view(sdpa)
+transpose: f64[2, 3, 11/sp, 8] = transpose(view_1, 1, 2)
 # return sdpa(rows[:, :, 6:], rows[:, :, :6], rows[:, :, :6])
-slice_1: f64[2, 3, 5, 8] = transpose[:, :, 6:]
-slice_2: f64[2, 3, 6, 8] = transpose[:, :, :6]
-sdpa_1: f64[2, 3, 5, 8] = sdpa(slice_1, slice_2, slice_2)
+slice_1: f64[2, 3, 5/sp, 8] | 5=||0:3|3:5 = transpose[:, :, 6:]
+slice_2: f64[2, 3, 6/sp, 8] | 6=0:3|3:6|| = transpose[:, :, :6]
+sdpa_1: f64[2, 3, 5/sp, 8] | 5=||0:3|3:5 = sdpa(slice_1, slice_2, slice_2)
 return [sdpa_1]
""",
    )


def test_raise_loss(planned, check, monkeypatch):
    """The logits, 17 for each token, stay for who reads what is returned."""
    monkeypatch.setattr(heads, "LEAST", 0)
    labels = torch.arange(22).reshape(2, 11) % 17
    plan = planned(of_labels, random(2, 11, 8), random(17, 8), labels)
    check(
        plan.diffs["raise_loss"],
        """\
 # loss = F.cross_entropy(logits[:, :-1].reshape(-1, 17), labels[:, 1:].reshape(-1))
-slice_1: f64[2, 10, 17] = linear[:, :-1]
-clone: f64[2, 10, 17] = clone(slice_1)
-_unsafe_view: f64[20, 17] = _unsafe_view(clone)
 slice_2: i64[2, 10] = labels[:, 1:]
...
 _unsafe_view_1: i64[20] = _unsafe_view(clone_1)
-cross_entropy_loss: f64[] = cross_entropy_loss(_unsafe_view, _unsafe_view_1)
-return [cross_entropy_loss, linear]
+slice_3: f64[2, 10, 8] = sdpa[:, :-1]
+reshape: f64[20, 8] = reshape(slice_3)
+token_losses: (f64[20], f64[20]) = mosaic.token_losses(reshape, head, target=_unsafe_view_1,
+    steps='', ignored=-100, smoothing=0)
+losses: f64[20] = token_losses[0]
+sum_1: f64[] = sum(losses)
+ne: b8[20] = ne(_unsafe_view_1, -100)
+sum_2: i64[] = sum(ne)
+div: f64[] = div(sum_1, sum_2)
+return [div, linear]
""",
    )
    check(
        plan.diffs["defer_outputs"],
        """\
 sdpa: f64[2, 11, 8] = sdpa(x, x, x)
-linear: f64[2, 11, 17] = linear(sdpa, head)
 # loss = F.cross_entropy(logits[:, :-1].reshape(-1, 17), labels[:, 1:].reshape(-1))
...
 div: f64[] = div(sum_1, sum_2)
-return [div, linear]
+return [div, sdpa]
""",
    )


def test_analyze_masks(planned, check):
    plan = planned(masked, random(2, 11, 8))
    check(
        plan.diffs["analyze_masks"],
        """\
 x: f64[2, 11, 8]
-# behind = torch.arange(11)[:, None] - torch.arange(11)
-arange: i64[11] = arange(11)
-unsqueeze: i64[11, 1] = unsqueeze(arange, 1)
-sub: i64[11, 11] = sub(unsqueeze, arange)
 # return sdpa(x, x, x, (behind >= 0) & (behind < 3))
-ge: b8[11, 11] = ge(sub, 0)
-lt: b8[11, 11] = lt(sub, 3)
-and_1: b8[11, 11] = __and__(ge, lt)
-sdpa: f64[2, 11, 8] = sdpa(x, x, x, and_1)
+sdpa: f64[2, 11, 8] = mosaic.sdpa(x, x, x, left=2, right=0)  # causal, window 3
 return [sdpa]
""",
    )


def test_choose_method(planned, check):
    plan = planned(table, random(2, 11, 3, 8))
    check(
        plan.diffs["choose_method"],
        """\
 # cells = sdpa(cells, cells, cells)
-sdpa: f64[2*11/sp, 3, 8] = sdpa(view, view, view)
+sdpa: f64[2*11/sp, 3, 8] = sdpa(view, view, view)  # local
 # rows = cells.reshape(2, 11, 3, 8).transpose(1, 2)
...
 slice_2: f64[2, 3, 6/sp, 8] | 6=0:3|3:6|| = transpose[:, :, :6]
-sdpa_1: f64[2, 3, 5/sp, 8] | 5=||0:3|3:5 = sdpa(slice_1, slice_2, slice_2)
+sdpa_1: f64[2, 3, 5/sp, 8] | 5=||0:3|3:5 = sdpa(slice_1, slice_2, slice_2)  # all_gather
 return [sdpa_1]
""",
    )


def test_assign_layouts(planned, axes, check):
    planned(averaged, *of_averaged())
    check(
        f"{axes['propagate'].layout}\n{axes['assign_layouts'].layout}",
        """\
11=0:3|3:6|6:9|9:11
11=0:2|2:4|4:6,10:11|6:10
""",
    )


def test_partition(planned, check):
    plan = planned(averaged, *of_averaged())
    check(
        plan.diffs["partition"],
        """\
 weight: f64[5, 8]
+slice_to: f64[2, 2, 8] = slice_to(x, shard(11=0:2|2:4|4:6,10:11|6:10 dim=1))
+slice_to_1: f64[2, 8] = slice_to(positions, shard(11=0:2|2:4|4:6,10:11|6:10 dim=0))
 # y = F.linear(x + positions, weight)
-add: f64[2, 11/sp, 8] | 11=0:2|2:4|4:6,10:11|6:10 = add(x, positions)
-linear: f64[2, 11/sp, 5] | 11=0:2|2:4|4:6,10:11|6:10 = linear(add, weight)
+add: f64[2, 2, 8] = add(slice_to, slice_to_1)
+weight_entered: f64[5, 8] = enter(weight, sp)
+linear: f64[2, 2, 5] = linear(add, weight_entered)
 # y = sdpa(y, y, y, is_causal=True)
-sdpa: f64[2, 11/sp, 5] | 11=0:2|2:4|4:6,10:11|6:10 = sdpa(linear, linear, linear, is_causal=True)
-    # all_gather, causal
+sdpa: f64[2, 2, 5] = sdpa(linear, linear, linear)  # all_gather, 11 x 11
 # return y.mean(dim=1)
-mean: f64[2, 5] = mean(sdpa, [1])
-return [mean]
+mean: f64[2, 5] = sum(sdpa, [1])
+sum_across: f64[2, 5] = sum_across(mean, sp, 'sum')
+mean_1: f64[2, 5] = div(sum_across, 11)
+return [mean_1]
""",
    )


def test_rewrite_attention(planned, check):
    plan = planned(averaged, *of_averaged())
    check(
        plan.diffs["rewrite_attention"],
        """\
 # y = sdpa(y, y, y, is_causal=True)
-sdpa: f64[2, 2, 5] = sdpa(linear, linear, linear)  # all_gather, 11 x 11
+reshape: f64[2, 1, 2, 5] = reshape(linear)
+reshape_1: f64[2, 1, 2, 5] = reshape(linear)
+reshape_2: f64[2, 1, 2, 5] = reshape(linear)
+attention: (f64[2, 1, 2, 5], f64[2, 1, 2]) = mosaic.attention(reshape, reshape_1, reshape_2,
+    plan(all_gather causal q,k=11=0:2|2:4|4:6,10:11|6:10 scale=0.4472))
+getitem: f64[2, 1, 2, 5] = attention[0]
+reshape_3: f64[2, 2, 5] = reshape(getitem)
 # return y.mean(dim=1)
-mean: f64[2, 5] = sum(sdpa, [1])
+mean: f64[2, 5] = sum(reshape_3, [1])
 sum_across: f64[2, 5] = sum_across(mean, sp, 'sum')
""",
    )


# --- LOWERING -----------------------------------------------------------------------------------


def test_pin_collectives(planned, check):
    """So that AOTAutograd takes no two of them for one; backward's are numbered, too."""
    plan = planned(projected, torch.randn(2, 11, 8).double(), random(6, 8), random(5, 6), random(5))
    check(
        plan.diffs["pin_collectives"],
        """\
 # return F.linear(sdpa(y, y, y), outer, bias)
-attention: (f64[2, 1, 3, 6], f64[2, 1, 3]) = mosaic.attention(mm, mm, mm, plan(all_gather
-    q,k=11=0:3|3:6|6:9|9:11 scale=0.4082))
+attention: (f64[2, 1, 3, 6], f64[2, 1, 3]) = mosaic.attention(mm, mm, mm, plan(all_gather
+    q,k=11=0:3|3:6|6:9|9:11 scale=0.4082), number=1)
 addmm: f64[6, 5] = addmm(bias, attention[0], outer)
-gather: f64[2, 11, 5] = mosaic.gather(addmm, shard(11=0:3|3:6|6:9|9:11 dim=1))
+gather: f64[2, 11, 5] = mosaic.gather(addmm, shard(11=0:3|3:6|6:9|9:11 dim=1), number=2)
 mm_1: f64[6, 6] = mm(tangents_1[:, 3:6], outer)
...
 sum_1: f64[1, 5] = sum(tangents_1[:, 3:6], [0], True)
-reduce_across: f64[5] = mosaic.reduce_across(sum_1, sp, 'sum')
-reduce_across_1: f64[5, 6] = mosaic.reduce_across(mm_2, sp, 'sum')
-attention_backward: (f64[2, 1, 3, 6], f64[2, 1, 3, 6], f64[2, 1, 3, 6]) =
-    mosaic.attention_backward(mm_1, mm, mm, mm, out=attention[0], lse=attention[1],
-    plan(all_gather q,k=11=0:3|3:6|6:9|9:11 scale=0.4082), need_dmask=False)
+reduce_across: f64[5] = mosaic.reduce_across(sum_1, sp, 'sum', number=3)
+reduce_across_1: f64[5, 6] = mosaic.reduce_across(mm_2, sp, 'sum', number=4)
+attention_backward: (f64[2, 1, 3, 6], f64[2, 1, 3, 6], f64[2, 1, 3, 6]) =
+    mosaic.attention_backward(mm_1, mm, mm, mm, out=attention[0], lse=attention[1],
+    plan(all_gather q,k=11=0:3|3:6|6:9|9:11 scale=0.4082), need_dmask=False, number=5)
 add_1: f64[2, 3, 6] = fused[add add](attention_backward)
...
 mm_3: f64[6, 8] = mm(add_1, x[:, 3:6])
-reduce_across_2: f64[6, 8] = mosaic.reduce_across(mm_3, sp, 'sum')
+reduce_across_2: f64[6, 8] = mosaic.reduce_across(mm_3, sp, 'sum', number=6)
 return [gather, None, reduce_across_2, reduce_across_1, reduce_across]
""",
    )


def test_lower_collectives(planned, check):
    plan = planned(differences, random(2, 11, 8))
    check(
        plan.diffs["lower_collectives"],
        """\
 attention: (f64[2, 1, 3, 8], f64[2, 1, 3]) = mosaic.attention(x[:, 3:6], x[:, 3:6], x[:, 3:6],
     plan(all_gather q,k=11=0:3|3:6|6:9|9:11 scale=0.3536), number=1)
-reshard: f64[2, 3, 8] = mosaic.reshard(attention[0], shard(10=0:3|3:6|6:9|9:10 dim=1),
-    shard(10=0:2|2:5|5:8|8:10 dim=1), number=2)
+all_to_all: f64[3, 2, 1, 1, 8] = all_to_all(attention[0], receive=[1, 2, 0, 0], send=[0, 2, 1, 0],
+    sp)
+wait: f64[3, 2, 1, 1, 8] = wait(all_to_all)
 # return y[:, 1:] - y[:, :-1]
-sub: f64[2, 3, 8] = sub(attention[0], reshard)
-gather: f64[2, 10, 8] = mosaic.gather(sub, shard(10=0:2|2:5|5:8|8:10 dim=1), number=3)
-return [gather, x[:, 3:6], attention[0], attention[1]]
+sub: f64[2, 3, 8] = sub(attention[0], wait)
+all_gather: f64[12, 2, 1, 1, 8] = all_gather(sub, 4, sp)
+wait_1: f64[12, 2, 1, 1, 8] = wait(all_gather)
+cat: f64[10, 2, 1, 1, 8] = cat([wait_1[:2], wait_1[3:11]])
+return [cat, x[:, 3:6], attention[0], attention[1]]
""",
    )


def test_lower_attention(planned, check):
    plan = planned(attended, torch.randn(2, 5, 11, 8).double())
    check(
        plan.diffs["lower_attention"],
        """\
 # return sdpa(x, x, x)
-attention: (f64[2, 5, 3, 8], f64[2, 5, 3]) = mosaic.attention(x[:, :, 3:6], x[:, :, 3:6], x[:, :,
-    3:6], plan(all_gather q,k=11=0:3|3:6|6:9|9:11 scale=0.3536))
-all_gather: f64[12, 2, 5, 1, 1, 8] = all_gather(attention[0], 4, sp)
+cat: f64[3, 160] = cat([x[:, :, 3:6], x[:, :, 3:6]], 1)
+all_gather_1: f64[12, 160] = all_gather(cat, 4, sp)
+wait_1: f64[12, 160] = wait(all_gather_1)
+flash: (f64[2, 5, 3, 8], f64[2, 5, 3]) = flash(x[:, :, 3:6], wait_1[:, :80][:, :, :11], wait_1[:,
+    80:160][:, :, :11], scale=0.3536)
+all_gather: f64[12, 2, 5, 1, 1, 8] = all_gather(flash[0], 4, sp)
 wait: f64[12, 2, 5, 1, 1, 8] = wait(all_gather)
""",
    )


def test_overlap_waits_late(planned, check):
    plan = planned(two_sums, torch.randn(2, 11, 8).double())
    check(
        plan.diffs["overlap"],
        """\
 all_reduce: f64[2, 8] = all_reduce(sum_1, 'sum', sp)
-wait: f64[2, 8] = wait(all_reduce)
 exp: f64[2, 3, 8] = exp(flash[0])
...
 wait_1: f64[2, 8] = wait(all_reduce_1)
+wait: f64[2, 8] = wait(all_reduce)
 div: f64[2, 8] = div(wait, wait_1)
""",
    )


def test_overlap_reduces_gradients_together(planned, check):
    plan = planned(projected, torch.randn(2, 11, 8).double(), random(6, 8), random(5, 6), random(5))
    check(
        plan.diffs["overlap backward"],
        """\
 sum_1: f64[1, 5] = sum(tangents_1[:, 3:6], [0], True)
-all_reduce: f64[5] = all_reduce(sum_1, 'sum', sp)
-wait: f64[5] = wait(all_reduce)
-all_reduce_1: f64[5, 6] = all_reduce(mm_2, 'sum', sp)
-wait_1: f64[5, 6] = wait(all_reduce_1)
+all_reduce_coalesced: (f64[5], f64[5, 6]) = all_reduce_coalesced([sum_1, mm_2], 'sum', sp)
 cat: f64[3, 24] = cat([view_1, view_1], 1)
...
 wait_2: f64[6, 8] = wait(all_reduce_2)
+wait_1: f64[5, 6] = wait(all_reduce_coalesced[1])
+wait: f64[5] = wait(all_reduce_coalesced[0])
 return [None, wait_2, wait_1, wait]
""",
    )
