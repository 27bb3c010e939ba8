"""One program of ``exact_cases`` on one rank: eager, through Mosaic, and what differs."""

from __future__ import annotations

import re
from typing import Any

import torch
from compare import assert_close
from exact_dying import PROGRAMS, Program
from torch import Tensor, nn

import mosaic
from mosaic.api.errors import MosaicError
from mosaic.torch_private import pytree


def built(program: Program) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    return program.model(), program.inputs()


def outcome(called: Any, model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Outputs, gradients of a projection of them, and what inputs, parameters and buffers are
    afterwards."""
    torch.manual_seed(7)
    outs = [x for x in pytree.tree_leaves(called(*args)) if isinstance(x, Tensor)]
    generator = torch.Generator().manual_seed(1)
    terms = [projected(x, generator) for x in outs if x.requires_grad]
    if terms:
        sum(terms).backward()
    given = {f"input {i}": x for i, x in enumerate(pytree.tree_leaves(args))}
    given.update({**dict(model.named_parameters()), **dict(model.named_buffers())})
    given = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    found: dict[str, Any] = {f"output {i}": x.detach().clone() for i, x in enumerate(outs)}
    found.update({name: x.detach().clone() for name, x in given.items()})
    found.update({f"gradient of {name}": x.grad for name, x in given.items() if x.is_leaf})
    return found


def projected(x: Tensor, generator: torch.Generator) -> Tensor:
    x = torch.view_as_real(x) if x.is_complex() else x
    return (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()


def differences(want: dict[str, Any], got: dict[str, Any]) -> list[str]:
    if want.keys() != got.keys():
        return [f"{list(want)} became {list(got)}"]
    gradients = [x for name, x in want.items() if name.startswith("gradient") and x is not None]
    scale = max((x.abs().nan_to_num(0, 0, 0).max().item() for x in gradients), default=0.0)
    found = []
    for name, expected in want.items():
        try:
            compare(name, got[name], expected, scale if name.startswith("gradient") else 0.0)
        except AssertionError as error:
            found.append(str(error))
    return found


def compare(name: str, actual: Any, expected: Any, scale: float) -> None:
    if expected is None or actual is None:
        zeros = [x for x in (expected, actual) if x is not None and x.any()]
        assert not zeros, f"{name}: {actual}, expected {expected}"
        return
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
    actual, expected = (torch.view_as_real(x) if x.is_complex() else x for x in (actual, expected))
    odd = ~expected.isfinite()
    assert actual[odd].equal(expected[odd]) or same_odd(actual, expected), f"{name}: nan or inf"
    assert_close(name, actual[~odd], expected[~odd], 1e-10, scale)


def same_odd(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan()) | b.isfinite()).all())


def check(name: str, p: int) -> tuple[str, list[str]]:
    """What this rank was refused ("" if it was not), and what differs from eager."""
    program = PROGRAMS[name]
    model, args = built(program)
    want = outcome(model, model, args)
    mosaic.init(sp_size=p)
    torch._dynamo.reset()
    model, args = built(program)
    options = {"inner": "eager", "spec": program.spec}
    compiled = torch.compile(model, backend="mosaic", options=options)
    try:
        got = outcome(compiled, model, args)
    except Exception as error:
        refusal = refused(error)
        if refusal is None:
            raise
        return re.sub(r" *\(.*?:\d+\)", "", str(refusal)), []
    return "", differences(want, got)


def refused(error: BaseException | None) -> MosaicError | None:
    while error is not None and not isinstance(error, MosaicError):
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return error
