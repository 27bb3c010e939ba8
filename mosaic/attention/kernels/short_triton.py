"""The Triton kernels of ``short``; imported where one runs: not every machine has Triton.

A problem is one batch and one head of keys: s rows of each query head that shares it, against t
keys, all in the registers of one program, which does ``loop`` of them. Strides, as all sizes but
the count of problems, are compiled in: what is known to be a multiple of 8 is read 8 numbers at
once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_at(batch, head, row, strides):
    """Where rows begin; int64, as a tensor may have more than 2^31 numbers."""
    return batch * strides[0] + head * strides[1] + row.to(tl.int64) * strides[2]


@triton.jit
def read(x, at, inside, dim: tl.constexpr, width: tl.constexpr):
    """(rows, width), with zeros outside."""
    d = tl.arange(0, width)
    return tl.load(x + at[:, None] + d[None, :], inside[:, None] & (d < dim)[None, :], 0.0)


@triton.jit
def write(x, at, inside, value, dim: tl.constexpr, width: tl.constexpr):
    d = tl.arange(0, width)
    found = value.to(x.dtype.element_ty)
    tl.store(x + at[:, None] + d[None, :], found, inside[:, None] & (d < dim)[None, :])


@triton.jit
def seen_pairs(mask, batch, row, key, in_keys, strides, lower: tl.constexpr, upper: tl.constexpr):
    """(rows, keys): the keys of a mask that all rows have, within a band."""
    seen = in_keys
    if strides is not None:
        at = batch * strides[0] + key * strides[1]
        seen = tl.load(mask + at, in_keys, 0) != 0
    ahead = key[None, :] - row[:, None]
    seen = seen[None, :] & (ahead == ahead)
    if lower is not None:
        seen = seen & (ahead >= lower)
    if upper is not None:
        seen = seen & (ahead <= upper)
    return seen


@triton.jit
def forward(
    q, k, v, mask, out, lse, problems, scale,
    at_q: tl.constexpr, at_k: tl.constexpr, at_v: tl.constexpr, at_out: tl.constexpr,
    at_mask: tl.constexpr, lower: tl.constexpr, upper: tl.constexpr,
    kv_heads: tl.constexpr, group: tl.constexpr, s: tl.constexpr, t: tl.constexpr,
    d: tl.constexpr, e: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr,
    d_width: tl.constexpr, e_width: tl.constexpr, loop: tl.constexpr,
):  # fmt: skip
    for step in tl.static_range(loop):
        problem = tl.program_id(0).to(tl.int64) * loop + step
        batch, kv_head = problem // kv_heads, problem % kv_heads
        row, key = tl.arange(0, rows), tl.arange(0, keys)
        in_rows, in_keys = (row < s) & (problem < problems), (key < t) & (problem < problems)
        k_tile = read(k, rows_at(batch, kv_head, key, at_k), in_keys, d, d_width)
        v_tile = read(v, rows_at(batch, kv_head, key, at_v), in_keys, e, e_width)
        seen = seen_pairs(mask, batch, row, key, in_keys, at_mask, lower, upper)
        for member in range(group):
            head = kv_head * group + member
            q_tile = read(q, rows_at(batch, head, row, at_q), in_rows, d, d_width)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            scores = tl.where(seen, scores * (scale * 1.4426950408889634), float("-inf"))
            largest = tl.max(scores, 1)
            largest = tl.where(largest == float("-inf"), 0.0, largest)
            weights = tl.exp2(scores - largest[:, None])
            total = tl.sum(weights, 1)
            found = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
            found = found / tl.where(total == 0, 1.0, total)[:, None]
            write(out, rows_at(batch, head, row, at_out), in_rows, found, e, e_width)
            at_lse = (batch * (kv_heads * group) + head) * s + row
            tl.store(lse + at_lse, (largest + tl.log2(total)) * 0.6931471805599453, in_rows)


@triton.jit
def backward(
    dout, q, k, v, mask, out, lse, dq, dk, dv, problems, scale,
    at_dout: tl.constexpr, at_q: tl.constexpr, at_k: tl.constexpr, at_v: tl.constexpr,
    at_out: tl.constexpr, at_dq: tl.constexpr, at_dk: tl.constexpr, at_dv: tl.constexpr,
    at_mask: tl.constexpr, lower: tl.constexpr, upper: tl.constexpr,
    kv_heads: tl.constexpr, group: tl.constexpr, s: tl.constexpr, t: tl.constexpr,
    d: tl.constexpr, e: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr,
    d_width: tl.constexpr, e_width: tl.constexpr, loop: tl.constexpr,
):  # fmt: skip
    for step in tl.static_range(loop):
        problem = tl.program_id(0).to(tl.int64) * loop + step
        batch, kv_head = problem // kv_heads, problem % kv_heads
        row, key = tl.arange(0, rows), tl.arange(0, keys)
        in_rows, in_keys = (row < s) & (problem < problems), (key < t) & (problem < problems)
        k_tile = read(k, rows_at(batch, kv_head, key, at_k), in_keys, d, d_width)
        v_tile = read(v, rows_at(batch, kv_head, key, at_v), in_keys, e, e_width)
        seen = seen_pairs(mask, batch, row, key, in_keys, at_mask, lower, upper)
        dk_tile = tl.zeros([keys, d_width], tl.float32)
        dv_tile = tl.zeros([keys, e_width], tl.float32)
        for member in range(group):
            head = kv_head * group + member
            q_tile = read(q, rows_at(batch, head, row, at_q), in_rows, d, d_width)
            douts = read(dout, rows_at(batch, head, row, at_dout), in_rows, e, e_width)
            outs = read(out, rows_at(batch, head, row, at_out), in_rows, e, e_width)
            at_lse = (batch * (kv_heads * group) + head) * s + row
            norms = tl.load(lse + at_lse, in_rows, float("-inf"))
            norms = tl.where(norms == float("-inf"), float("inf"), norms * 1.4426950408889634)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            scores = tl.where(seen, scores * (scale * 1.4426950408889634), float("-inf"))
            weights = tl.exp2(scores - norms[:, None])
            same = tl.sum(douts.to(tl.float32) * outs.to(tl.float32), 1)
            douts = douts.to(v_tile.dtype)
            dweights = tl.dot(douts, tl.trans(v_tile), input_precision="ieee")
            dscores = (weights * (dweights - same[:, None])).to(k_tile.dtype)
            dv_tile = tl.dot(
                tl.trans(weights.to(v_tile.dtype)), douts, dv_tile, input_precision="ieee"
            )
            dk_tile = tl.dot(tl.trans(dscores), q_tile, dk_tile, input_precision="ieee")
            found = tl.dot(dscores, k_tile, input_precision="ieee") * scale
            write(dq, rows_at(batch, head, row, at_dq), in_rows, found, d, d_width)
        write(dk, rows_at(batch, kv_head, key, at_dk), in_keys, dk_tile * scale, d, d_width)
        write(dv, rows_at(batch, kv_head, key, at_dv), in_keys, dv_tile, e, e_width)
