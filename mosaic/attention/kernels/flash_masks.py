"""FlashAttention 4 with a mask that is structure: on Hopper, quicker than torch's flex kernels.

As those, it is given lists of blocks that are seen and a function of a pair, here of scalars of the
CuTe language. Only what is known to mean the same there is read: numbers that are added and
compared, and what is made of booleans. The rest goes to ``flex``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mosaic.attention.kernels.flash_attn import FLASH_ATTN_4, STEP, cap_of, cap_options, imported
from mosaic.attention.kernels.flex import FLEX, with_lists
from mosaic.attention.kernels.kernel import (
    MOST_BATCHES,
    Case,
    Gradients,
    Kernel,
    multiple_of,
    narrowed,
    seq_first,
    widened,
    without_padding,
)
from mosaic.attention.kernels.seen_blocks import BLOCK
from mosaic.attention.merge import Partial
from mosaic.attention.tiles import Ref, Step, TileProgram

#: Wider heads have tiles of fewer keys than a block.
MOST_DIMS = 128
KINDS: dict[torch.dtype, type] = {torch.int32: int, torch.int64: int, torch.bool: bool}
OF_NUMBERS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "add": operator.add,
    "sub": operator.sub,
}
OF_BOOLEANS: dict[str, Callable[..., Any]] = {
    "and": operator.and_,
    "or": operator.or_,
    "not": lambda x: x == 0,
}


def reads(program: str, leaves: Sequence[torch.dtype]) -> bool:
    """Whether all that a program does is known here."""
    kinds: list[type | None] = [KINDS.get(dtype) for dtype in leaves]
    for step in TileProgram.parse(program).steps if program else ():
        kinds.append(after(step, kinds))
    return bool(program) and None not in kinds and kinds[-1] is bool


def after(step: Step, kinds: Sequence[type | None]) -> type | None:
    """Whether a step gives a number or a boolean; None where that is not known."""
    name, given = step.op.partition(".")[0], {kind_of(x, kinds) for x in step.args}
    if step.kwargs or None in given:
        return None
    if name in ("add", "sub"):
        return int if given == {int} else None
    family, _, rest = name.partition("_")
    known = family == "logical" or (family == "bitwise" and given == {bool})
    return bool if name in OF_NUMBERS or (known and rest in OF_BOOLEANS) else None


def kind_of(x: Any, kinds: Sequence[type | None]) -> type | None:
    """A number that is written in the program is one of 32 bits there."""
    if isinstance(x, Ref):
        return kinds[x.number]
    return int if type(x) is int and -(2**31) <= x < 2**31 else None


@lru_cache(maxsize=256)
def mask_mod(program: str, along: tuple[tuple[int, ...], ...]) -> Callable[..., Any]:
    """Whether a query sees a key, as the package asks. ``along``: the dims of each leaf."""
    cutlass = import_module("cutlass")
    to_vector = import_module("flash_attn.cute.utils").scalar_to_ssa

    def number(x: Any) -> Any:
        return cutlass.Int32(x) if isinstance(x, cutlass.Boolean) else x

    def done(step: Step, known: Sequence[Any]) -> Any:
        args = [known[x.number] if isinstance(x, Ref) else x for x in step.args]
        name = step.op.partition(".")[0]
        if name in OF_NUMBERS:
            return OF_NUMBERS[name](*map(number, args))
        rest = name.partition("_")[2]
        booleans = [cutlass.Boolean(x) for x in args]
        return OF_BOOLEANS[rest](*(map(number, booleans) if rest == "not" else booleans))

    def seen(batch, head, query, key, lengths, leaves):
        at = (batch[0], head[0], query[0], key[0])
        known = [
            leaf[tuple(at[d] for d in dims) or 0] for leaf, dims in zip(leaves, along, strict=True)
        ]
        known = [cutlass.Boolean(x) if isinstance(x, cutlass.Uint8) else x for x in known]
        for step in TileProgram.parse(program).steps:
            known.append(done(step, known))
        return to_vector(known[-1], cutlass.Boolean)

    seen.__cute_hash__ = f"{__name__} {program} {along}"  # type: ignore[attr-defined]
    return seen


def options_of(
    q: Tensor, k: Tensor, leaves: Sequence[Tensor], program: str, scale: float, way: int
) -> dict[str, Any]:
    """What the package is told of a mask; ``way``: 0 for the keys of rows, 1 for rows of keys."""
    lists = with_lists(leaves, program, q, k)
    some, full = lists[2 * way :][:2], lists[4 + 2 * way :][:2]
    blocks = import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    along = tuple(tuple(d for d, n in enumerate(leaf.shape) if n > 1) for leaf in leaves)
    vectors = [leaf.reshape([n for n in leaf.shape if n > 1] or [1]) for leaf in leaves]
    return {
        "softmax_scale": scale,
        "mask_mod": mask_mod(program, along),
        "aux_tensors": [as_bytes(x).contiguous() for x in vectors],
        "block_sparse_tensors": blocks(*some, *full, block_size=(BLOCK, BLOCK)),
    }


def as_bytes(x: Tensor) -> Tensor:
    """A boolean in the form that the package can read."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x


@torch.library.custom_op(
    "mosaic::flash_masked",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor[] leaves, str program, float scale, float cap) "
    "-> (Tensor, Tensor)",
)
def flash_masked(q, k, v, leaves, program, scale, cap):
    """out and lse of the pairs that a structure sees; ``cap``: as in ``flash_attn``."""
    options = options_of(q, k, leaves, program, scale, 0) | cap_options(cap)
    tensors = [seq_first(x) for x in (q, k, v)]
    out, lse, *_ = imported()._flash_attn_fwd(*tensors, **options, return_lse=True)
    return seq_first(out), lse


@flash_masked.register_fake
def _(q, k, v, *_):
    out = q.new_empty([*seq_first(q).shape[:3], v.shape[3]])
    return seq_first(out), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "mosaic::flash_masked_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] leaves, "
    "str program, float scale, float cap) -> (Tensor, Tensor, Tensor)",
)
def flash_masked_backward(dout, q, k, v, out, lse, leaves, program, scale, cap):
    """dq, dk and dv, of the global out and lse."""
    options = options_of(q, k, leaves, program, scale, 1) | cap_options(cap, backward=True)
    dout, q, k, v, out = (seq_first(x) for x in (dout, q, k, v, out))
    grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    into = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    imported()._flash_attn_bwd(q, k, v, out, dout, lse, **options, **into)
    dq, dk, dv = (seq_first(grad) for grad in grads)
    return dq, dk, dv


@flash_masked_backward.register_fake
def _(dout, q, k, v, *_):
    dq, dk, dv = (seq_first(x.new_empty(seq_first(x).shape)) for x in (q, k, v))
    return dq, dk, dv


def _wide(*tensors: Tensor) -> list[Tensor]:
    """All with the same head dim: others fail."""
    dim = multiple_of(STEP, max(x.shape[-1] for x in tensors))
    return [widened(x, dim) for x in tensors]


def _forward(q, k, v, *, mask, scale, scores=None, **_) -> Partial:
    wide = _wide(q, k, v)
    op = torch.ops.mosaic.flash_masked
    out, lse = op(*wide, list(mask.leaves), mask.program, scale, cap_of(scores))
    return narrowed(out, v.shape[-1]), lse


def _backward(dout, q, k, v, out, lse, *, mask, scale, scores=None, **_) -> Gradients:
    wide = _wide(dout.to(q.dtype), q, k, v, out.to(q.dtype))
    op = torch.ops.mosaic.flash_masked_backward
    options = (list(mask.leaves), mask.program, scale, cap_of(scores))
    return without_padding(op(*wide, lse.contiguous(), *options), q, k, v)


def _fits(case: Case) -> bool:
    able = case.is_structured and FLEX.fits(case) and case.capability == 9
    fits = max(case.head_dim, case.v_dim) <= MOST_DIMS
    known = able and fits and reads(case.program, case.leaves)
    return known and FLASH_ATTN_4.fits(case._replace(mask=None))


#: On Hopper, where it was tried.
FLASH_MASKS = Kernel("flash_attn 4, masks", _fits, "none", _forward, _backward, MOST_BATCHES)
