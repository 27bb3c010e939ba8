"""On a rank: run a program's text in eager mode and through Mosaic, and say how they compare.

Outcomes: ok, refused (a MosaicError), wrong, crash, and those that say nothing about Mosaic:
invalid (eager mode fails), unstable (rounding decides the result) and torch (torch.compile without
Mosaic is wrong, too). The pool adds died and hang.
"""

from __future__ import annotations

import functools
import logging
import math
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from fuzz.program import loaded, on_device
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import mosaic
import mosaic.frontend.backend
from mosaic import MosaicError

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
LOW = 5e-2  # where autocast rounds to bfloat16


@dataclass(frozen=True)
class Verdict:
    """What one rank found."""

    outcome: str
    detail: str = ""
    gathered: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()


def judge(source: str, device: str = "cpu") -> Verdict:
    """Compare a program with its reference; runs on every rank of a pool."""
    quiet()
    space = loaded(source if device == "cpu" else on_device(source, device))
    space |= {"SOURCE": source, "DEVICE": device}
    torch.set_default_dtype(space["DTYPE"])
    try:
        return compared(space)
    finally:
        torch.set_default_dtype(torch.float32)


def quiet() -> None:
    """What is gathered is in the plan."""
    for name in ("mosaic", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def compared(space: dict[str, Any]) -> Verdict:
    try:
        want = reference(space)
    except Exception as error:
        return Verdict("invalid", repr(error)[:300])
    try:
        with mosaic.plans() as plans:
            got = through_mosaic(space, space["INIT"])
    except Exception as error:
        verdict = failed(error)
        own = verdict.outcome == "crash" and set(want) <= wrong_by_torch(space, want)
        return Verdict("torch", verdict.detail) if own else verdict
    wrong = differences(want, got, tolerance(space))
    shown = {
        "gathered": tuple(g for p in plans for g in p.gathered),
        "attentions": tuple(str(a) for p in plans for a in p.attentions),
    }
    if wrong and space["REFERENCE"] == "eager":
        wrong = [w for w in wrong if w[0] not in unstable(space, want)]
        if not wrong:
            return Verdict("unstable", **shown)
        if {key for key, _ in wrong} <= wrong_by_torch(space, want):
            return Verdict("torch", str(wrong[0]), **shown)
    if wrong:
        return Verdict("wrong", "; ".join(f"{k}: {text}" for k, text in wrong[:6]), **shown)
    return Verdict("ok", **shown)


def wrong_by_torch(space: dict[str, Any], want: dict[str, Any]) -> set[str]:
    """What torch.compile gives another result for without Mosaic; all, where it fails."""
    torch._dynamo.reset()
    try:
        got = results(space, lambda m: torch.compile(m, backend="aot_eager"))
    except Exception:
        return set(want)
    finally:
        torch._dynamo.reset()
    return {key for key, _ in differences(want, got, tolerance(space))}


def reference(space: dict[str, Any]) -> dict[str, Any]:
    """Eager mode; a program that draws random numbers is compared with Mosaic on one rank."""
    torch._dynamo.reset()
    if space["REFERENCE"] == "eager":
        return results(space, lambda model: model)
    results(space, lambda model: model)
    spec = space["SPEC"]
    try:
        if spec is None:
            return through_mosaic(space, {"sp_size": 1})
        return through_mosaic({**space, "SPEC": alone(spec)}, ALONE)
    finally:
        torch._dynamo.reset()


ALONE = {"mesh_shape": (1, 1), "mesh_axes": ("r", "c")}


def alone(spec: mosaic.ShardingSpec) -> mosaic.ShardingSpec:
    return mosaic.ShardingSpec(
        inputs=spec.inputs, axes={a: mosaic.Ring(mesh="r") for a in spec.axes}
    )


def through_mosaic(space: dict[str, Any], init: dict[str, Any]) -> dict[str, Any]:
    torch._dynamo.reset()
    context = mosaic.init(**(init if space["DEVICE"] == "cpu" else kept_mesh(**init)))
    options: dict[str, Any] = {"inner": "eager"}
    if space["SPEC"] is not None:
        options["spec"] = space["SPEC"]
    try:
        return results(space, lambda m: torch.compile(m, backend="mosaic", options=options))
    finally:
        context.shutdown()


@functools.cache
def kept_mesh(
    sp_size: int = 1,
    mesh_shape: tuple[int, ...] | None = None,
    mesh_axes: tuple[str, ...] = ("sp",),
) -> dict[str, Any]:
    """What ``mosaic.init`` makes a mesh of, as one mesh for all programs: communicators of NCCL
    are dear."""
    shape = mesh_shape or (sp_size,)
    whole = (dist.get_world_size() // math.prod(shape), *shape)
    return {"mesh": init_device_mesh("cuda", whole, mesh_dim_names=("dp", *mesh_axes))}


def results(space: dict[str, Any], wrap: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """Everything that a user could look at after forward and backward, by name."""
    torch.manual_seed(0)
    with torch.device(space["DEVICE"]):
        model, args = space["make"]()
    run = wrap(model)
    torch.manual_seed(7)
    with nullcontext() if space["GRAD"] else torch.no_grad():
        for _ in range(space["CALLS"]):
            out = run(*args)
    found: dict[str, Any] = {}
    leaves, structure = pytree.tree_flatten(out)
    found["structure"] = str(structure)
    for i, leaf in enumerate(leaves):
        found[f"out{i}"] = leaf.detach().clone() if isinstance(leaf, Tensor) else repr(leaf)
        if isinstance(leaf, Tensor) and space["GRAD"]:
            found[f"out{i} requires grad"] = leaf.requires_grad
    if space["GRAD"]:
        backward([leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad])
    inputs = [(f"input {i}", a) for i, a in enumerate(args)]
    for name, tensor in [*inputs, *model.named_parameters(), *model.named_buffers()]:
        found[f"value of {name}"] = tensor.detach().clone()
        if tensor.requires_grad and tensor.is_leaf:
            grad = tensor.grad
            found[f"grad of {name}"] = None if grad is None else grad.detach().clone()
    if space["DEVICE"] == "cuda":
        torch.cuda.synchronize()  # an index out of bounds is only seen now
    return found


def backward(outputs: list[Tensor]) -> None:
    """Of a weighted sum of all outputs; the weights are alike in every run."""
    generator = torch.Generator("cpu").manual_seed(1)
    terms = []
    for out in outputs:
        real = torch.view_as_real(out) if out.is_complex() else out
        weights = noise(real, generator)
        terms.append((real.double() * weights).sum())
    if terms:
        sum(terms[1:], terms[0]).backward()


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(like.device)


# --- comparing -----------------------------------------------------------------------------------


def tolerance(space: dict[str, Any]) -> float:
    if space["DTYPE"] == torch.float32 and "autocast" in space["SOURCE"]:
        return LOW
    return TOLERANCE[space["DTYPE"]]


def differences(want: dict[str, Any], got: dict[str, Any], tol: float) -> list[tuple[str, str]]:
    grads = [w for k, w in want.items() if k.startswith("grad") and isinstance(w, Tensor)]
    scale = max((size_of(g) for g in grads), default=0.0)
    found = []
    for key in [*want, *(k for k in got if k not in want)]:
        # Of a gradient of zero rounding leaves 1e-14.
        floor = max(1e-3 * scale, 1e-4) if key.startswith("grad") else 1e-6
        text = difference(want.get(key), got.get(key), tol, floor)
        if text:
            found.append((key, text))
    return found


def difference(want: Any, got: Any, tol: float, floor: float) -> str:
    if isinstance(want, Tensor) != isinstance(got, Tensor):
        tensor = want if isinstance(want, Tensor) else got
        is_zero = (want is None or got is None) and not tensor.any()
        return "" if is_zero else f"{shown(got)}, expected {shown(want)}"
    if not isinstance(want, Tensor):
        return "" if want == got else f"{got}, expected {want}"
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"{shown(got)}, expected {shown(want)}"
    if not (want.is_floating_point() or want.is_complex()):
        return "" if torch.equal(want, got) else "other integers"
    a, b = (real(t) for t in (want, got))
    odd = ~a.isfinite() | ~b.isfinite()
    if not torch.equal(a[odd].nan_to_num(7e99), b[odd].nan_to_num(7e99)):
        return "nan or inf in other places"
    size = max(size_of(want), floor)
    error = (a - b)[~odd].abs().max().item() if not odd.all() else 0.0
    return f"off by {error / size:.1e} of {size:.1e}" if error > tol * size else ""


def real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def size_of(tensor: Tensor) -> float:
    finite = real(tensor)
    finite = finite[finite.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def shown(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


# --- what rounding decides ------------------------------------------------------------------------


ROUNDING = {torch.float64: 4e-15, torch.float32: 1e-6, torch.bfloat16: 4e-3}


@dataclass
class Rounding(TorchDispatchMode):
    """Every new value that is not a whole number is off by a few ulps."""

    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator("cpu").manual_seed(self.seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(r.alias_info for r in func._schema.returns):
            return out
        return pytree.tree_map_only(Tensor, self.shaken, out)

    def shaken(self, value: Tensor) -> Tensor:
        if value.dtype not in ROUNDING or value.layout != torch.strided:
            return value
        off = value * (1 + ROUNDING[value.dtype] * noise(value, self.generator)).to(value.dtype)
        return torch.where((value == value.round()) | ~value.isfinite(), value, off)


def unstable(space: dict[str, Any], want: dict[str, Any]) -> set[str]:
    """Names of results that change with rounding: of those nobody can say that they are wrong."""
    found: set[str] = set()
    for seed in range(2):
        try:
            with Rounding(seed):
                shaken = results(space, lambda model: model)
        except Exception:
            continue
        found |= {key for key, _ in differences(want, shaken, tolerance(space) / 10)}
    return found


# --- failures ------------------------------------------------------------------------------------


def failed(error: BaseException) -> Verdict:
    ours = ours_in(error)
    if ours is not None:
        text = str(ours)
        return Verdict("refused" if is_clear(text) else "crash", text)
    inner = getattr(error, "inner_exception", None) or error
    frames = traceback.extract_tb(inner.__traceback__)[-8:]
    where = "\n  ".join(f"{'/'.join(f.filename.split('/')[-3:])}:{f.lineno}" for f in frames)
    return Verdict("crash", f"{type(inner).__name__}: {str(inner)[:700]}\n  {where}")


def is_clear(text: str) -> bool:
    """A sentence, and a way out."""
    return len(text.splitlines()[0].split()) > 2 and "\n  fix " in text


def ours_in(error: BaseException | None) -> MosaicError | None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MosaicError):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return None
