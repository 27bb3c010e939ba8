"""Attention: every rank of tensor, every shape of mask, queries, keys and values whole or cut."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rule_case import Cases, b, f, i

CASES = Cases()
add = CASES.add
sdpa = F.scaled_dot_product_attention


def steps(n):
    """How far each key stands behind each query."""
    return torch.arange(n)[:, None] - torch.arange(n)


def all_of(x):
    return sdpa(x, x.cos(), x.sin())


add("attention", sdpa, f(2, 3, 5, 4), f(2, 3, 7, 4), f(2, 3, 7, 4))
add("attention same length", sdpa, f(2, 1, 5, 4), f(2, 1, 5, 4), f(2, 1, 5, 4))
add(
    "attention causal",
    lambda q, k, v: sdpa(q, k, v, is_causal=True),
    f(2, 5, 4),
    f(2, 5, 4),
    f(2, 5, 4),
)
add("attention scale", lambda q, k, v: sdpa(q, k, v, scale=0.3), f(5, 4), f(7, 4), f(7, 2))
add("attention 3d", sdpa, f(2, 5, 4), f(2, 7, 4), f(2, 7, 2))
add("attention 5d", sdpa, f(2, 2, 3, 5, 4), f(2, 2, 3, 7, 4), f(2, 2, 3, 7, 4), pairs=False)
add("attention of itself", all_of, f(2, 2, 5, 4))
add("attention of itself causal", lambda x: sdpa(x, x, x, is_causal=True), f(2, 2, 5, 4))
add(
    "attention gqa",
    lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
    f(2, 6, 5, 4),
    f(2, 3, 7, 4),
    f(2, 3, 7, 4),
)
add(
    "attention mqa",
    lambda q, k, v: sdpa(q, k.expand(2, 3, 7, 4), v.expand(2, 3, 7, 4)),
    f(2, 3, 5, 4),
    f(2, 1, 7, 4),
    f(2, 1, 7, 4),
)
add(
    "attention repeat_kv",
    lambda q, k, v: sdpa(
        q, *(x[:, :, None].expand(2, 2, 3, 5, 4).reshape(2, 6, 5, 4) for x in (k, v))
    ),
    f(2, 6, 5, 4),
    f(2, 2, 5, 4),
    f(2, 2, 5, 4),
)
add("attention broadcast batch", sdpa, f(2, 3, 5, 4), f(1, 3, 7, 4), f(1, 3, 7, 4))
for shape in (
    (5, 7),
    (1, 7),
    (5, 1),
    (2, 1, 5, 7),
    (1, 3, 5, 7),
    (2, 3, 1, 7),
    (2, 3, 5, 7),
    (1, 1, 5, 7),
):
    given = f(2, 3, 5, 4), f(2, 3, 7, 4), f(2, 3, 7, 4)
    add(
        f"attention bias {shape}",
        lambda q, k, v, m: sdpa(q, k, v, m),
        *given,
        f(*shape),
        pairs=False,
    )
add("attention bias vector", lambda x, m: sdpa(x, x, x, m), f(2, 3, 5, 4), f(5))
add(
    "attention mask",
    lambda x, m: sdpa(x, x, x, m | torch.eye(5).bool()),
    f(2, 2, 5, 4),
    b(2, 1, 5, 5),
)
add(
    "attention mask of keys",
    lambda x, m: sdpa(x, x, x, m[:, None, None, :]),
    f(2, 2, 5, 4),
    b(2, 5),
)
add(
    "attention mask 5d",
    lambda x, m: sdpa(x, x, x, m),
    f(2, 2, 2, 5, 4),
    f(2, 1, 1, 5, 5),
    pairs=False,
)
add("attention mask 3d", lambda x, m: sdpa(x, x, x, m), f(2, 5, 4), f(2, 5, 5))
add("attention mask 3d broadcast", lambda x, m: sdpa(x, x, x, m), f(2, 5, 4), f(1, 5, 5))
add(
    "attention window",
    lambda x: sdpa(x, x, x, (steps(5) >= 0) & (steps(5) < 3)),
    f(2, 3, 5, 4),
)
add("attention of both sides", lambda x: sdpa(x, x, x, steps(5).abs() < 2), f(2, 5, 4))
add(
    "attention documents",
    lambda x, ids: sdpa(x, x, x, (ids[:, :, None] == ids[:, None])[:, None] & (steps(5) >= 0)),
    f(2, 3, 5, 4),
    i(2, 2, 5),
)
add(
    "attention documents 3d",
    lambda x, ids: sdpa(x, x, x, ids[:, :, None] == ids[:, None]),
    f(2, 5, 4),
    i(2, 2, 5),
)
add(
    "attention causal padding",
    lambda x, m: sdpa(x, x, x, m[:, None, None, :] & (steps(5) >= 0)),
    f(2, 2, 5, 4),
    b(2, 5),
)
add("attention keys shifted", lambda x: sdpa(x[:, 2:], x[:, :5], x[:, :5]), f(2, 7, 4))
add(
    "attention keys longer",
    lambda x, p: sdpa(x, torch.cat([p, x], 1), torch.cat([p, x], 1)),
    f(2, 5, 4),
    f(2, 3, 4),
)
add(
    "attention keys and values cut apart", lambda x, y: sdpa(x[1:], x[:-1], y[1:]), f(6, 4), f(6, 2)
)
add("attention dropout", lambda x: sdpa(x, x, x, dropout_p=0.3), f(2, 3, 5, 4), random=True)
add(
    "attention dropout of batches",
    lambda x, m: sdpa(x, x, x, m, dropout_p=0.3),
    f(2, 2, 5, 4),
    f(5, 5),
    random=True,
)
add(
    "attention raised",
    lambda q, k, v: ((q @ k.transpose(-1, -2)) * 0.5).softmax(-1) @ v,
    f(2, 5, 4),
    f(2, 7, 4),
    f(2, 7, 4),
)
add("attention by hand", lambda x: ((x @ x.mT).softmax(-1) + 0.1) @ x, f(2, 5, 4))
add("attention broadcast queries", sdpa, f(1, 3, 5, 4), f(2, 3, 7, 4), f(2, 3, 7, 4), pairs=False)
add("attention broadcast heads", sdpa, f(2, 3, 5, 4), f(2, 1, 7, 4), f(2, 1, 7, 4), pairs=False)
add(
    "attention broadcast dropout",
    lambda q, k: sdpa(q, k, k, dropout_p=0.2),
    f(2, 3, 5, 4),
    f(1, 3, 7, 4),
    pairs=False,
    random=True,
)
