"""torch's flex attention kernels: on CUDA, a mask that is structure.

They are called below ``torch.nn.attention.flex_attention``: its backward cannot be told the output
and the log-sum-exp of all keys where the forward saw some. Whether a pair is seen is computed in
the kernel, of the numbers at its query and its key, and so is what its score becomes; blocks
without any such pair are left out, and those of nothing else are done without a look at the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic.attention.kernels.kernel import MOST_BATCHES, TABLES, Case, Gradients, Kernel
from mosaic.attention.kernels.pairs import buffers_of, mask_mod, score_mod
from mosaic.attention.kernels.seen_blocks import BLOCK, blocks_of
from mosaic.attention.merge import Partial, unwritten
from mosaic.attention.structure import Structure
from mosaic.torch_private import compiled_by_inductor, flex_backward, flex_blocks, flex_forward

#: The kernels' log-sum-exp is one of powers of 2.
LN2 = log(2)
LISTS = 8
Function = Callable[..., tuple[Tensor, ...]]
#: What kernels know of a mask, or what changes a score; and the buffers that its function reads.
Mod = tuple[Any, tuple[Tensor, ...]]


@lru_cache(maxsize=256)
def lists_of(program: str, rows: int, keys: int) -> Function:
    """The blocks that a structure sees, of its leaves: how many, and which, of each row and of each
    column, first those that are seen in part and then the full ones."""

    def lists(*leaves: Tensor) -> tuple[Tensor, ...]:
        some, full = blocks_of(Structure(program, leaves), rows, keys)
        ways = [way for blocks in (some & ~full, full) for way in (blocks, blocks.mT)]
        return tuple(x for way in ways for x in listed(way))

    return lists


def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are True, and which: these first. int32"""
    numbers = blocks.to(torch.int32).contiguous()
    order = numbers.argsort(dim=-1, descending=True, stable=True)
    return numbers.sum(-1, dtype=torch.int32), order.to(torch.int32)


class Programs(NamedTuple):
    """The programs of a call, and how many of its leaves are the mask's; the rest are those of
    ``scores``, if that is not empty."""

    mask: str
    mask_leaves: int
    scores: str
    scale: float

    def parts(self, rest: Sequence[Tensor]) -> tuple[Structure, Structure | None]:
        """Of the lists of blocks and all leaves."""
        leaves = tuple(rest[LISTS:])
        scores = Structure(self.scores, leaves[self.mask_leaves :]) if self.scores else None
        return Structure(self.mask, leaves[: self.mask_leaves]), scores


@lru_cache(maxsize=256)
def forward_of(programs: Programs) -> Function:
    """out and lse of q, k, v, the ``lists_of`` a structure, and its leaves and the scores'."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        mask, change = mods(programs, q, k, rest)
        out, lse = flex_forward(q, k, v, mask, programs.scale, change)
        return out.contiguous(), lse * LN2

    return forward


@lru_cache(maxsize=256)
def backward_of(programs: Programs) -> Function:
    """dq, dk, dv of dout, q, k, v, the global out and lse (to the base of 2), and as above."""

    def backward(dout, q, k, v, out, lse, *rest: Tensor) -> tuple[Tensor, ...]:
        mask, change = mods(programs, q, k, rest)
        grads = flex_backward(dout, q, k, v, out, lse, mask, programs.scale, change)
        return tuple(grad.contiguous() for grad in grads)

    return backward


def mods(programs: Programs, q: Tensor, k: Tensor, rest: Sequence[Tensor]) -> tuple[Mod, Mod]:
    """What the kernels know of a mask: lists of blocks and the function of a pair; and the function
    that changes scores. Each with its buffers."""
    mask, scores = programs.parts(rest)
    blocks = flex_blocks((q.shape[2], k.shape[2]), rest[:LISTS], BLOCK, mask_mod(mask))
    change = (score_mod(scores), buffers_of(scores)) if scores else (None, ())
    return (blocks, buffers_of(mask)), change


#: Compiled functions by what they were compiled for.
_COMPILED: dict[Any, Function] = {}


def run(function: Function, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """By Inductor, which has the kernels; on a CPU as plain math, pair by pair.

    What the kernels read must come as ``tensors``: they take lists of blocks and log-sum-exps to be
    contiguous, and Inductor pads what it computes itself (torch 2.11: another batch's rows are
    read, silently).
    """
    device = tensors[0].device
    if device.type == "cpu":
        return afresh(device, function, *tensors)
    shapes = [(x.shape, x.stride(), x.dtype, x.device) for x in tensors]
    key = (function, torch.get_float32_matmul_precision(), *shapes)
    if key not in _COMPILED:
        _COMPILED[key] = afresh(device, compiled_by_inductor, function, tensors)
    return tuple(_COMPILED[key](*tensors))


def afresh(device: torch.device, function: Callable[..., Any], *args: Any) -> Any:
    """Call it in a thread of its own, where no mode, autocast or gradient of the caller's is on.

    The gradient of a score is traced by autograd, in that thread: the one that does it for this
    device otherwise may be the caller, in a backward, and waits.
    """

    def call() -> Any:
        alone = torch.autograd.set_multithreading_enabled(False)
        with alone, torch.no_grad(), torch.accelerator.device_index(device.index):
            return function(*args)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def with_lists(leaves: Sequence[Tensor], program: str, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """The lists of blocks, and the leaves."""
    lists = run(lists_of(program, q.shape[2], k.shape[2]), leaves)
    return (*(x.reshape(-1).view(x.shape) for x in lists), *leaves)


@torch.library.custom_op(
    "mosaic::flex",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor[] leaves, str program, Tensor[] score_leaves, "
    "str scores, float scale) -> (Tensor, Tensor)",
)
def flex(q, k, v, leaves, program, score_leaves, scores, scale):
    """out and lse of the pairs that a structure sees, whose scores a program may change."""
    rest = with_lists(leaves, program, q, k)
    programs = Programs(program, len(leaves), scores, scale)
    out, lse = run(forward_of(programs), (q, k, v, *rest, *score_leaves))
    return out, lse


@flex.register_fake
def _(q, k, v, *rest):
    return unwritten(q, v)


@torch.library.custom_op(
    "mosaic::flex_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] leaves, "
    "str program, Tensor[] score_leaves, str scores, float scale) -> (Tensor, Tensor, Tensor)",
)
def flex_backward_op(dout, q, k, v, out, lse, leaves, program, score_leaves, scores, scale):
    """dq, dk and dv, each shaped like its input."""
    rest = with_lists(leaves, program, q, k)
    programs = Programs(program, len(leaves), scores, scale)
    tensors = (dout, q, k, v, out, lse / LN2, *rest, *score_leaves)
    dq, dk, dv = run(backward_of(programs), tensors)
    return dq, dk, dv


@flex_backward_op.register_fake
def _(dout, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def written_out(x: Tensor) -> Tensor:
    """Without a dim of stride 0: the backward kernel lays out gradients as it finds the inputs."""
    return x.contiguous() if 0 in x.stride() else x


def arguments_of(mask: Structure, scores: Structure | None, scale: float) -> tuple[Any, ...]:
    """What ops take behind their tensors: programs are text, beside their leaves."""
    changes = ([], "") if scores is None else (list(scores.leaves), scores.program)
    return list(mask.leaves), mask.program, *changes, scale


def _forward(q, k, v, *, mask, scale, scores=None, **_) -> Partial:
    q, k, v = (written_out(x) for x in (q, k, v))
    out, lse = torch.ops.mosaic.flex(q, k, v, *arguments_of(mask, scores, scale))
    return out, lse


def _backward(dout, q, k, v, out, lse, *, mask, scale, scores=None, **_) -> Gradients:
    tensors = (written_out(x) for x in (dout.to(q.dtype), q, k, v, out.to(q.dtype)))
    rest = arguments_of(mask, scores, scale)
    return Gradients(*torch.ops.mosaic.flex_backward(*tensors, lse.contiguous(), *rest))


def refused(case: Case) -> str:
    """Why a structure is not run as it is; "" where it is."""
    if case.device != "cuda" or case.capability < 8:
        return "no GPU of Ampere's or later"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if case.dropout:
        return "dropout"
    if case.scores == TABLES:
        return "a table that is looked up, or learned, pair by pair is slow in its kernels"
    if case.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return str(case.dtype).removeprefix("torch.")
    if not 16 <= min(case.head_dim, case.v_dim) <= max(case.head_dim, case.v_dim) <= 256:
        return f"head dims {case.head_dim} and {case.v_dim} are not in 16 ... 256"
    return "nothing is attended to" if case.empty else ""


def _fits(case: Case) -> bool:
    return case.is_structured and not refused(case)


#: A band is in the structure.
FLEX = Kernel("flex", _fits, "none", _forward, _backward, MOST_BATCHES)
