"""Packed texts: the state begins anew with each.

``begins`` is one more operand with a row for each token, boolean (batch, rows): whether a text
begins there. So a stretch of rows may begin within a text, and what is before it reaches as far as
that one. Packages are told by their own arguments; elsewhere texts are run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BEGINS = "begins"
Run = Callable[[Mapping[str, Any]], tuple[Tensor, Tensor]]


def beginnings(texts: Tensor) -> Tensor:
    """Of the number of each row's text (batch, rows)."""
    return F.pad(texts[:, 1:] != texts[:, :-1], (1, 0), value=True)


def one_by_one(
    run: Run, given: Mapping[str, Any], begins: Tensor, rows: Mapping[str, int], state: str,
    out: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``state``: the name of the first one; ``out``: in which dim the result has rows."""
    n, starts = begins.shape[1], begins.any(0).nonzero().flatten().tolist()
    outs, last = [], given[state]
    for start, stop in pairwise(sorted({0, *starts, n})):
        part = {x: given[x].narrow(d, start, stop - start) for x, d in rows.items() if x in given}
        if last is not None:
            is_new = begins[:, start].view(-1, *[1] * (last.ndim - 1))
            last = last.masked_fill(is_new, 0)
        one, last = run({**given, **part, state: last})
        outs.append(one)
    assert last is not None
    return torch.cat(outs, out), last


def by_cu_seqlens(
    run: Run, given: Mapping[str, Any], begins: Tensor, state: str
) -> tuple[Tensor, Tensor]:
    """As fla is told: where each text begins, of one batch; and a first state for each."""
    starts = begins[0, 1:].nonzero().flatten() + 1
    ends = starts.new_full((1,), begins.shape[1])
    edges = torch.cat([starts.new_zeros(1), starts, ends])
    first = given[state]
    if first is not None:
        first = first.masked_fill(begins[0, 0], 0)
        first = F.pad(first, [0, 0] * (first.ndim - 1) + [0, len(edges) - 2])
    out, last = run({**given, state: first, "cu_seqlens": edges})
    return out, last[-1:]


def by_seq_idx(
    run: Run, given: Mapping[str, Any], begins: Tensor, state: str
) -> tuple[Tensor, Tensor]:
    """As mamba_ssm is told: the number of each row's text. A first state is that of text 0."""
    return run({**given, "seq_idx": begins.cumsum(1).int()})


#: By the argument that tells a package's function of texts.
TOLD = {"cu_seqlens": by_cu_seqlens, "seq_idx": by_seq_idx}
