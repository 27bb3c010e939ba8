"""Masks and changes of scores that are run as structure, against float64.

    python tests/gpu/check_masks.py [--only WORDS ...] [--device cpu]

Relative errors of the output and of the worst gradient, by every kernel that takes a mask as
structure, for three simulated ranks in zigzag: each visits the keys of all, merges, and goes back
with the global output and log-sum-exp. Exits 1 if a result is wrong or fails. On a CPU the flex
kernels are plain math.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor

from mosaic.api.errors import UnsupportedError
from mosaic.attention import kernels
from mosaic.attention.attend import attend, attend_backward
from mosaic.attention.blocks import FULL, Band
from mosaic.attention.kernels.flex import FLEX
from mosaic.attention.kernels.kernel import TABLES
from mosaic.attention.kernels.math import MATH
from mosaic.attention.kernels.tiled import TILES
from mosaic.attention.mask_gradients import OfLeaves
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.shift import shift_of
from mosaic.attention.strategy import LOCAL
from mosaic.attention.visit import Inputs, visit
from mosaic.layout import Layout

CAUSAL = Band(None, 0)
HALF = torch.bfloat16
#: The largest error that rounding explains: this much, or a few times the plain kernel's.
ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-12}


def say(words: str = "") -> None:
    print(words, flush=True)


# --- a mask on simulated ranks --------------------------------------------------------------------


def by_ranks(
    tensors: list[Tensor],
    inputs: Inputs,
    band: Band,
    scale: float,
    tile: str = "",
    scores: str = "",
    ranks: int = 3,
) -> list[Tensor]:
    """out, dq, dk, dv and those of learned leaves, for q, k, v and dout, of what ranks do, one
    after the other."""
    q, k, v, dout = tensors
    cut = Layout.zigzag if inputs.query_documents is None else partial(Layout.zigzags, chunk=32)
    layouts = [cut(x.shape[2], ranks) for x in (q, k)]
    queries, keys = ([list(layout.indices(r)) for r in range(ranks)] for layout in layouts)
    whole = AttentionPlan(LOCAL, 0, "", *layouts, band, scale, tile=tile, scores=scores)
    given = (dout, q, k, v, *(inputs.leaves[i] for i in whole.learned))
    out, dq, dk, dv, *dleaves = (torch.zeros_like(x, dtype=torch.float64) for x in given)
    for rank, at in enumerate(queries):
        plan = replace(whole, rank=rank)
        mask = inputs.mask
        has_rows = mask is not None and mask.shape[2] > 1
        here = inputs._replace(mask=mask[:, :, at] if has_rows else mask)
        mine, dmine, known = q[:, :, at], dout[:, :, at], None
        rows = layouts[0].ranks[rank]
        shift = shift_of(plan, rows, mine, (k, v), here)
        visits = [visit(plan, rows, chunk, mine, here, shift) for chunk in layouts[1].ranks]
        home = OfLeaves(plan.learned, rows, here)
        for there, found in zip(keys, visits, strict=True):
            known = attend(mine, k[:, :, there], v[:, :, there], found, known)
        out[:, :, at] = known[0].double()
        for there, chunk, found in zip(keys, layouts[1].ranks, visits, strict=True):
            block = (mine, k[:, :, there], v[:, :, there], *known)
            grads = attend_backward(dmine, *block, found, bool(plan.learned))
            dq[:, :, at] += grads.q
            dk[:, :, there] += grads.k
            dv[:, :, there] += grads.v
            home.add(chunk, grads.leaves)
        for i, grad in zip(plan.learned, dleaves, strict=True):
            grad += home.total()[i]
    return [out, dq, dk, dv, *dleaves]


@dataclass(frozen=True)
class Check:
    """One line of the table of errors."""

    name: str
    band: Band = FULL
    mask: str = ""
    documents: bool = False
    dim: int = 64
    v_dim: int = 64
    kv_heads: int = 2
    dtype: torch.dtype = HALF
    tokens: int = 900
    cap: float = 0.0


CHECKS = (
    Check("documents, causal", CAUSAL, documents=True),
    Check("documents, window", Band(99, 0), documents=True),
    Check("documents in no order", CAUSAL, "shuffled", True),
    Check("padding", mask="padding"),
    Check("padding, documents", CAUSAL, "padding", True),
    Check("padding of heads", CAUSAL, "heads", kv_heads=4),
    Check("prefix, documents", FULL, "prefix", True),
    Check("distances", mask="distances"),
    Check("padding, 120 tokens", mask="padding", tokens=120),
    Check("no key", mask="nothing"),
    Check("no key, documents", CAUSAL, "nothing", True),
    Check("3 tokens", CAUSAL, "padding", True, tokens=3),
    *(
        Check(f"head dim {n}", CAUSAL, "", True, n, n)
        for n in (16, 32, 48, 72, 80, 96, 120, 128, 256)
    ),
    Check("head dim 64, v 128", CAUSAL, "", True, 64, 128),
    Check("softcap", cap=2.0),
    Check("softcap, documents, causal", CAUSAL, documents=True, cap=2.0),
    Check("table", mask="table"),
    Check("table, documents, causal", CAUSAL, "table", True),
    Check("table, softcap, window", Band(99, 0), "table", cap=2.0),
    Check("table, float16", CAUSAL, "table", True, dtype=torch.float16),
    Check("table, float32", CAUSAL, "table", True, dtype=torch.float32),
    Check("ALiBi, causal", CAUSAL, "alibi"),
    Check("ALiBi, documents", mask="alibi", documents=True),
    Check("padding by low numbers", mask="low"),
    Check("low numbers, documents, causal", CAUSAL, "low", True),
    Check("low numbers, float32", CAUSAL, "low", dtype=torch.float32),
    Check("float16", CAUSAL, "padding", True, dtype=torch.float16),
    Check("float32, head dim 128", CAUSAL, "padding", True, 128, 128, dtype=torch.float32),
)
#: The kernels that take a mask as structure, and the one that caps the scores of a band.
STRUCTURED = (
    "flash_attn 4",
    "short",
    "short float32",
    "flash_attn 4, seen keys",
    "flash_attn 4, masks",
    "tiles",
    "flex",
)
#: Boolean programs as ``analyze_masks`` reads them: of positions of queries and keys, and lengths.
SEEN = {
    "prefix": "bool: le.Tensor(%1, %0); lt.Tensor(%1, %2); bitwise_or.Tensor(%3, %4)",
    "distances": "bool: sub.Tensor(%1, %0); remainder.Scalar(%3, 3); eq.Scalar(%4, 0); "
    "lt.Tensor(%1, %2); logical_and(%5, %6)",
}
#: Those that are added to the scores, of positions and what is learned. (A float mask of padding
#: has the lowest number where a key is hidden: a row that sees no other weighs those alike.)
REACH = 64
LOOKED_UP = f"sub.Tensor(%1, %0); clamp(%{{0}}, -{REACH}, {REACH}); add.Tensor(%{{1}}, {REACH}); "
BIASES = {
    "table": "d%2 mild: " + LOOKED_UP.format(3, 4) + "embedding(%2, %5)",
    "alibi": "d%2 mild: sub.Tensor(%1, %0); abs(%3); neg(%4); mul.Tensor(%5, %2)",
    "low": "d%2: " + LOOKED_UP.format(4, 5) + "embedding(%2, %6); add.Tensor(%7, %3)",
}


def inputs_of(check: Check, device: torch.device) -> Inputs:
    """With rows that see nothing, and a batch that differs from the other."""
    n = check.tokens
    at = torch.arange(n, device=device)
    ids = None
    if check.documents:
        ids = torch.stack([at // (n // 5 + 1) * 7 - 2**62, (at + 40) ** 2 // (n * n // 3 + 1)])
        ids = ids.flip(1)[:, torch.randperm(n, device=device)] if check.mask == "shuffled" else ids
    lengths = torch.tensor([n // 3, n - n // 9], device=device).view(2, 1, 1, 1)
    mask = at < lengths if check.mask in ("padding", "heads") else None
    if check.mask == "nothing":
        mask = (at < lengths) & (lengths > n // 2)
    if check.mask == "heads":
        mask = mask & (at % torch.arange(2, 6, device=device).view(1, 4, 1, 1) > 0)
    leaves = ()
    if check.mask in SEEN:
        leaves = (at.view(1, 1, n, 1), at.view(1, 1, 1, n), lengths)
    if check.mask in BIASES:
        learned = torch.randn(2 * REACH + 1, 4, device=device)
        learned = learned[:1, :, None, None] ** 2 / 9 if check.mask == "alibi" else learned
        leaves = (at.view(1, 1, n, 1), at.view(1, 1, 1, n), learned.to(check.dtype))
    if check.mask == "low":
        lowest = torch.finfo(check.dtype).min
        leaves += ((at >= lengths % (n // 2 + 1)).to(check.dtype) * lowest,)
    return Inputs(mask, ids, ids, None, leaves)


def tensors_of(check: Check, device: torch.device) -> list[Tensor]:
    """q, k, v, dout: (2, heads, tokens, dim)."""
    torch.manual_seed(0)
    sizes = ((4, check.dim), (check.kv_heads, check.dim), (check.kv_heads, check.v_dim))
    shapes = [(2, heads, check.tokens, dim) for heads, dim in (*sizes, (4, check.v_dim))]
    return [torch.randn(shape, device=device).to(check.dtype) for shape in shapes]


def dense(check: Check, inputs: Inputs, device: torch.device) -> Tensor:
    """(2, 4, tokens, tokens): which keys a query sees, written out."""
    n = check.tokens
    at = torch.arange(n, device=device)
    ahead = at - at[:, None]
    left, right = (n if x is None else x for x in check.band)
    seen = ((ahead >= -left) & (ahead <= right)).expand(2, 4, n, n)
    if inputs.query_documents is not None:
        ids = inputs.query_documents
        seen = seen & (ids[:, None, :, None] == ids[:, None, None])
    if inputs.mask is not None:
        seen = seen & inputs.mask
    if check.mask == "prefix":
        seen = seen & ((ahead <= 0) | (at < inputs.leaves[2]))
    if check.mask == "distances":
        seen = seen & (ahead % 3 == 0) & (at < inputs.leaves[2])
    return seen


def bias_of(check: Check, learned: Tensor, inputs: Inputs) -> Tensor:
    """(2|1, 4, tokens, tokens), written out."""
    at = inputs.leaves[0].flatten()
    ahead = at - at[:, None]
    if check.mask == "alibi":
        return -ahead.abs() * learned
    table = learned[ahead.clamp(-REACH, REACH) + REACH].movedim(2, 0)[None]
    return table if check.mask == "table" else table + inputs.leaves[3].to(table.dtype)


def plain(
    check: Check, tensors: list[Tensor], inputs: Inputs, seen: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """out, dq, dk, dv and that of what is learned; a row that sees nothing has out 0."""
    q, k, v, dout = (x.detach().to(dtype) for x in tensors)
    learned = [inputs.leaves[2].detach().to(dtype)] if check.mask in BIASES else []
    leaves = [x.requires_grad_() for x in (q, k, v, *learned)]
    k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = check.cap * (scores / check.cap).tanh() if check.cap else scores
    scores = scores + bias_of(check, learned[0], inputs) if learned else scores
    scores = scores.masked_fill(~seen, float("-inf"))
    blind = ~seen.any(-1, keepdim=True)
    out = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ v
    return [x.detach() for x in (out, *torch.autograd.grad(out, leaves, dout))]


def programs_of(check: Check, inputs: Inputs) -> tuple[str, str]:
    """That of the mask, and that of the scores, which is given the leaves and the scaled score."""
    tile, dtype = SEEN.get(check.mask, ""), str(check.dtype).removeprefix("torch.")
    tile = f"{dtype} {BIASES[check.mask]}" if check.mask in BIASES else tile
    n = len(inputs.leaves)
    return tile, f"{dtype}: tanh(%{n}); mul.Tensor(%{n + 1}, {check.cap})" if check.cap else ""


def relative(x: Tensor, y: Tensor) -> float:
    """The distance, relative to the norm, or to 1 where that is less."""
    return float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1))


def errors(found: list[Tensor], want: list[Tensor]) -> tuple[float, float]:
    """Of the output, and of the worst gradient."""
    apart = [relative(x, y) for x, y in zip(found, want, strict=True)]
    return apart[0], max(apart[1:]) if all(e == e for e in apart) else float("nan")


def checked(check: Check, device: torch.device) -> tuple[str, str]:
    """A line of the table, and what is wrong."""
    if device.type == "cpu":
        check = replace(check, tokens=min(check.tokens, 300))
        use_flex_on_cpu()
    base, found = tried(check, STRUCTURED, device)
    cells = [f"{base[0]:.1e} {base[1]:.1e}", *(text for text, _ in found.values())]
    wrong = [problem for _, problem in found.values() if problem]
    return f"{check.name:32}{''.join(f'{text:26}' for text in cells)}", "; ".join(wrong)


def tried(
    check: Check, names: Sequence[str], device: torch.device
) -> tuple[tuple[float, float], dict[str, tuple[str, str]]]:
    """The errors of plain math, and by the names of kernels what ``cell`` says of them."""
    inputs, tensors = inputs_of(check, device), tensors_of(check, device)
    seen, programs = dense(check, inputs, device), programs_of(check, inputs)
    want = plain(check, tensors, inputs, seen, torch.float64)
    base = errors(plain(check, tensors, inputs, seen, check.dtype), want)
    allowed = [max(ROUNDING[check.dtype], 4 * e) for e in base]
    scale = check.dim**-0.5 / (check.cap or 1)
    call = partial(by_ranks, tensors, inputs, check.band, scale, *programs)
    return base, {name: cell(check, name, call, want, allowed) for name in names}


def cell(
    check: Check,
    name: str,
    call: Callable[[], list[Tensor]],
    want: list[Tensor],
    allowed: list[float],
) -> tuple[str, str]:
    """What to print of a kernel, and what is wrong."""
    try:
        with kernels.using(name):
            found = errors(call(), want)
    except UnsupportedError:
        return "-", ""
    except Exception as error:  # one that fails must not stop the rest
        first = (str(error).splitlines() or [""])[0]
        return "fails", f"{check.name}, {name}: {type(error).__name__}: {first}"
    text = f"{found[0]:.1e} {found[1]:.1e}"
    if all(error <= most for error, most in zip(found, allowed, strict=True)):
        return text, ""
    return text + "!", f"{check.name}, {name}: errors {text}, allowed {allowed}"


def check_errors(device: torch.device, only: list[str] | None) -> list[str]:
    """What is wrong. On a GPU processes share the checks: nearly all of the time is compilation."""
    names = "".join(f"{name:26}" for name in ("plain math", *STRUCTURED))
    say(f"{'relative errors: out, gradients':32}{names}on 3 ranks")
    wrong = []
    with ProcessPoolExecutor(14, get_context("spawn")) as pool:
        run = pool.map if device.type == "cuda" else map
        checks = [c for c in CHECKS if not only or any(word in c.name for word in only)]
        for line, problem in run(partial(checked, device=device), checks):
            say(line)
            wrong += [problem] if problem else []
    return wrong


def use_flex_on_cpu() -> None:
    """As if flex did structures there, and tables went tile by tile."""
    kernels.KERNELS = (
        FLEX._replace(fits=lambda case: case.is_structured and case.scores != TABLES),
        TILES._replace(fits=lambda case: case.is_structured and case.scores == TABLES),
        MATH,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", nargs="*", help="the checks with one of these words in their names"
    )
    given = parser.parse_args()
    device = torch.device(given.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    say(f"torch {torch.__version__}, {where}\n")
    wrong = check_errors(device, given.only)
    say("\n" + "\n".join(wrong or ["all right"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
