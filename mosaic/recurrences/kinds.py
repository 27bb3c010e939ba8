"""The recurrences that are known by name, and what each gives from a state of zero.

Each is affine in the state it begins with: of rows t it gives ``out_t = own_t + reading_t S``, and
in the end ``S' = state + along S``. So a stretch of rows is these four tensors, whatever is before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.recurrences.texts import BEGINS

Given = Mapping[str, Any]  # arguments by name
Run = Callable[..., tuple[Tensor, Tensor]]  # the user's function: what it gives, its last state


class Response(NamedTuple):
    """Of a stretch of rows."""

    own: Tensor  # what it gives from a state of zero
    state: Tensor  # the state behind it then
    along: Tensor  # what a state before it becomes behind it
    reading: Tensor  # how its rows read such a state


@dataclass(frozen=True)
class Kind:
    """A family of functions that transformers' models call."""

    rows: Mapping[str, int]  # operands with a row for each token: in which dim
    out: int  # in which dim the result has them
    reading: int  # and a ``Response``'s reading
    asks: str  # the argument that asks for the last state
    state: str  # the argument for the first one; "": there is none
    texts: str  # the argument that tells a package's function of packed texts; "": it knows of none
    is_pair: bool  # whether a result without the last state is a pair with None
    along_shape: Callable[[Sequence[int]], Sequence[int]]  # by that of the state
    respond: Callable[[Run, Given], Response]
    carried: Callable[[Tensor, Tensor], Tensor]  # (along, state)
    read: Callable[[Tensor, Tensor], Tensor]  # (reading, state)


# --- the gated delta rule, and Kimi's: S' = (decay - beta k k^T decay) S + beta k v^T -----------


def respond_by_columns(run: Run, given: Given) -> Response:
    """The columns of the state (k_dim, v_dim) go their ways apart: more of them, that begin with
    the identity and get no values, say what becomes of any state (nothing behind the beginning of a
    text)."""
    value, width = given["value"], given["key"].shape[-1]
    batch, _, heads, v_dim = value.shape
    value = torch.cat([value, value.new_zeros(*value.shape[:-1], width)], -1)
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    first = torch.eye(width, dtype=dtype, device=value.device)
    first = F.pad(first, (v_dim, 0)).expand(batch, heads, -1, -1)
    out, last = run(**{**given, "value": value, "initial_state": first})
    own, reading = out.split([v_dim, width], -1)
    state, along = last.split([v_dim, width], -1)
    return Response(own, state, along, reading)


DELTA = Kind(
    rows=dict.fromkeys(("query", "key", "value", "g", "beta", BEGINS), 1),
    out=1,
    reading=1,
    asks="output_final_state",
    state="initial_state",
    texts="cu_seqlens",
    is_pair=True,
    along_shape=lambda state: (*state[:-1], state[-2]),
    respond=respond_by_columns,
    carried=torch.matmul,
    read=lambda reading, state: torch.einsum("bthk,bhkv->bthv", reading, state),
)


# --- Mamba: S' = exp(A dt) S + dt B x^T, each element of the state by itself ---------------------


def steps_of(given: Given, bias: Tensor | None) -> Tensor:
    """dt as the functions make it."""
    dt = given["dt"] if bias is None else given["dt"] + bias.to(given["dt"].dtype)
    return F.softplus(dt) if given["dt_softplus"] else dt


def respond_of_mamba(run: Run, given: Given) -> Response:
    """(batch, channels, rows); A (channels, state), B and C (batch, state, rows)."""
    bias = given["delta_bias"]
    bias = None if bias is None else bias[..., None]
    dt = steps_of({**given, "dt_softplus": given["delta_softplus"]}, bias)
    a, c = given["A"].to(dt.dtype), given["C"].to(dt.dtype)
    decay = torch.exp(dt.cumsum(2)[..., None] * a[:, None])  # (batch, channels, rows, state)
    reading = decay * c.mT[:, None]
    if given["z"] is not None:
        reading = reading * F.silu(given["z"].to(dt.dtype))[..., None]
    return Response(*run(**given), decay[:, :, -1], reading)


MAMBA = Kind(
    rows=dict.fromkeys(("hidden_states", "dt", "B", "C", "z"), 2),
    out=2,
    reading=2,
    asks="return_last_state",
    state="",
    texts="",
    is_pair=False,
    along_shape=lambda state: state,
    respond=respond_of_mamba,
    carried=torch.mul,
    read=lambda reading, state: torch.einsum("bctn,bcn->bct", reading, state),
)


def respond_of_mamba2(run: Run, given: Given) -> Response:
    """(batch, rows, heads, dim); A (heads), B and C (batch, rows, groups, state)."""
    low, high = given["dt_limit"]
    dt = torch.clamp(steps_of(given, given["dt_bias"]), low, high)
    decay = torch.exp(dt.cumsum(1) * given["A"].to(dt.dtype))  # (batch, rows, heads)
    if given.get(BEGINS) is not None:
        decay = decay.masked_fill(given[BEGINS].cumsum(1)[..., None] > 0, 0)
    c = given["C"].to(dt.dtype)
    c = c.repeat_interleave(decay.shape[2] // c.shape[2], 2)
    return Response(*run(**given), decay[:, -1], decay[..., None] * c)


MAMBA2 = Kind(
    rows=dict.fromkeys(("hidden_states", "dt", "B", "C", BEGINS), 1),
    out=1,
    reading=1,
    asks="return_final_states",
    state="initial_states",
    texts="seq_idx",
    is_pair=False,
    along_shape=lambda state: state[:2],
    respond=respond_of_mamba2,
    carried=lambda along, state: along[..., None, None] * state,
    read=lambda reading, state: torch.einsum("bthn,bhpn->bthp", reading, state),
)

#: By the names that these functions have in transformers' models.
KINDS = {
    "torch_chunk_gated_delta_rule": DELTA,
    "torch_recurrent_gated_delta_rule": DELTA,
    "chunk_kimi_delta_attention": DELTA,
    "recurrent_kimi_delta_attention": DELTA,
    "mamba2_chunk_scan": MAMBA2,
    "mamba_selective_scan": MAMBA,
}
