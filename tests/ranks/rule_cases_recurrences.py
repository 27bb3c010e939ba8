"""Recurrences: a state that goes along an axis."""

from __future__ import annotations

from typing import Any

import torch
from rule_case import Cases, f, unit
from torch import Tensor

from mosaic.recurrences.call import Recurrence
from mosaic.recurrences.op import RECURRENCE

CASES = Cases()
add = CASES.add


def torch_recurrent_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
    initial_state: Tensor | None = None, output_final_state: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As it is defined, in the dtype that it is given, and called as transformers' is."""
    shape = (query.shape[0], *value.shape[2:])
    state = value.new_zeros(*shape[:2], query.shape[-1], shape[2])
    state, out = state if initial_state is None else initial_state, [value[:, :0]]
    for t in range(query.shape[1]):
        state = g[:, t, :, None, None] * state
        missing = value[:, t] - torch.einsum("bhk,bhkv->bhv", key[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], beta[:, t, :, None] * missing)
        out.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state)[:, None])
    return torch.cat(out, 1), state


def recurrence(*given: Tensor) -> Any:
    names = ("query", "key", "value", "g", "beta", "initial_state")
    named = dict(zip(names, given, strict=False))
    known, tensors = Recurrence.of(torch_recurrent_gated_delta_rule, named, 3)
    return RECURRENCE(tensors, known.encode())


INPUTS = (f(2, 5, 3, 4), unit(2, 5, 3, 4), f(2, 5, 3, 6), unit(2, 5, 3), unit(2, 5, 3))
add("recurrence", recurrence, *INPUTS)
add("recurrence from a state", recurrence, *INPUTS, f(2, 3, 4, 6))
add("recurrence without its state", lambda *x: recurrence(*x)[0], *INPUTS)
