"""What one rank does in the tests of ShardedTensor: programs without torch.compile, on parts."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import cases
import torch
import torch.distributed as dist
from model_jobs import loss_of
from rule_case import Case, Cut
from rule_cases import CASES
from torch import Tensor

import mosaic
from mosaic.runtime import agreement
from mosaic.torch_private import pytree


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, mosaic.ShardedTensor) else x


def outcome(case: Case, cut: Cut = ()) -> list[Tensor | None]:
    """All outputs of a sample, and the gradients of its inputs; ``cut``: (input, dim)s."""
    torch.manual_seed(0)
    given = case.tensors()
    used = list(given)
    for number, dim in cut:
        used[number] = mosaic.distribute(used[number], dim)
    outs = [x for x in pytree.tree_leaves(case.run(*used)) if isinstance(x, Tensor)]
    generator = torch.Generator().manual_seed(1)
    terms = [projected(x, generator) for x in outs if x.requires_grad]
    learned = [x for x in given if x.requires_grad]
    grads = torch.autograd.grad(sum(terms), learned, allow_unused=True) if terms else ()
    return [whole(x) for x in (*outs, *grads)]


def projected(x: Tensor, generator: torch.Generator) -> Tensor:
    x = torch.view_as_real(x) if x.is_complex() else x
    return (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()


def check(names: list[str], p: int) -> list[str]:
    """What is wrong with these samples, each dim of each input cut in turn."""
    mosaic.init(sp_size=p)
    wrong = []
    for case in (CASES[name] for name in names):
        want = outcome(case)
        for cut in case.single_cuts():
            wrong += [f"{case.name} {cut}: {text}" for text in differences(case, want, cut)]
    return wrong


def differences(case: Case, want: list[Tensor | None], cut: Cut) -> list[str]:
    try:
        for number, (a, b) in enumerate(zip(outcome(case, cut), want, strict=True)):
            if a is None or b is None:  # no gradient is one of zeros
                assert not any(x is not None and x.any() for x in (a, b)), f"{number}: {a}, {b}"
            else:
                tol = max(case.tol, 1e-8)  # so exact are torch's own forms of some derivatives
                torch.testing.assert_close(a, b, rtol=tol, atol=tol, equal_nan=True)
    except Exception as error:
        return [f"{type(error).__name__}: {error}".splitlines()[0][:200]]
    return []


#: For each model the dims of its inputs that are cut.
MODELS = {"gpt": (1, 1), "llama": (1, 1), "vit": (2, None), "table": (1, None, None)}


def model(name: str, p: int) -> dict[str, Any]:
    """Loss and gradients of a model, of parts if there are several ranks, without a compiler."""
    torch.manual_seed(0)
    built, args, kwargs = getattr(cases, name)()
    if p:
        mosaic.init(sp_size=p)
        pairs = zip(args, MODELS[name], strict=True)
        args = [x if dim is None else mosaic.distribute(x, dim) for x, dim in pairs]
    loss = loss_of(built(*args, **kwargs))
    loss.backward()
    grads = {n: None if x.grad is None else whole(x.grad) for n, x in built.named_parameters()}
    return {"loss": whole(loss.detach()), "gradients": grads}


def in_and_out() -> dict[str, Any]:
    ranks = mosaic.init(None, mesh_shape=(2, 2), mesh_axes=("r", "c"))
    torch.manual_seed(0)
    given = torch.randn(2, 7, 5, 8, dtype=torch.float64, requires_grad=True)
    x = mosaic.distribute(mosaic.distribute(given, 2, mesh="c"), 1, mesh="r")
    weights = torch.randn(2, 7, 5, 8, dtype=torch.float64)
    (grad,) = torch.autograd.grad(x.full_tensor().mul(weights).sum(), given)
    rows = mosaic.Layout.of(7, [[(3, 7)], [(0, 3)]])
    mine = torch.arange(7.0)[[3, 4, 5, 6] if ranks.rank("r") == 0 else [0, 1, 2]]
    parts = mosaic.ShardedTensor.from_local(mine, 0, rows, "r")
    y = x.detach() * 1
    y.mul_(2).add_(weights)
    return {
        "cut": list(x.local.shape),
        "whole again": torch.equal(x.full_tensor(), given),
        "gradient": torch.equal(whole(grad), weights),
        "of parts": torch.equal(parts.full_tensor(), torch.arange(7.0)),
        "written": torch.equal(y.full_tensor(), given * 2 + weights),
        "number": abs(x.sum().item() - given.sum().item()) < 1e-10,
        "repr": repr(x).partition(", local=")[0],
        "again": refusal(lambda: mosaic.distribute(x, 1, mesh="c")),
        "no dim": refusal(lambda: mosaic.distribute(given, 7, mesh="r")),
        "no part": refusal(lambda: mosaic.ShardedTensor.from_local(mine[1:], 0, rows, "r")),
    }


def refusal(call: Any, whole: bool = False) -> str:
    try:
        call()
    except mosaic.MosaicError as error:
        return str(error) if whole else str(error).splitlines()[0]
    return ""


def outside(p: int) -> list[tuple[str, int]]:
    """Writes by an index that no rank has, and that are no error."""
    mosaic.init(sp_size=p)
    x, passed = mosaic.distribute(torch.ones(5, 2), 0), []
    for name, write in WRITES.items():
        for index in (5, -6):
            with suppress(IndexError, RuntimeError):
                write(x, torch.tensor([index]))
                passed.append((name, index))
    return passed


WRITES: dict[str, Any] = {
    "index_put": lambda x, i: x.index_put((i,), torch.zeros(1, 2)),
    "index_add": lambda x, i: x.index_add(0, i, torch.ones(1, 2)),
    "index_copy": lambda x, i: x.index_copy(0, i, torch.zeros(1, 2)),
    "index_fill": lambda x, i: x.index_fill(0, i, 0.0),
    "scatter": lambda x, i: x.scatter(0, i[:, None], 0.0),
    "scatter_add": lambda x, i: x.scatter_add(0, i[:, None], torch.ones(1, 1)),
}


def another_compiler(p: int) -> list[str]:
    """What is said where AOTAutograd is given a tensor that is cut, which has run these ops."""
    mosaic.init(sp_size=p)
    said = []
    for name, program in PROGRAMS.items():
        x = mosaic.distribute(torch.ones(2, 5, 4, requires_grad="learns" in name), 1)
        program(x)
        try:
            torch.compile(program, backend="aot_eager")(x)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            said.append(str(error.inner_exception).splitlines()[0])
    return said


PROGRAMS: dict[str, Any] = {
    "pointwise": lambda x: x * 2,
    "sums, and learns": lambda x: x.sum(1),
    "in place": lambda x: (x + 1).add_(x),
    "view": lambda x: x.transpose(1, 2),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
}


def another_length(p: int) -> str:
    """What is said where the last rank's tensor is shorter."""
    ranks = mosaic.init(sp_size=p)
    x = torch.ones(6 if ranks.rank() + 1 < p else 5, 2)
    return refusal(lambda: mosaic.distribute(x, 0).cumsum(0), whole=True)


def miscounted(p: int, rows: int) -> list[str]:
    """What is said of so many rows for three trues: without a compiler, and with one."""
    mosaic.init(sp_size=p)
    x, mask = mosaic.distribute(torch.ones(5, 2), 0), torch.arange(5) % 2 == 0

    def write(x: Tensor, mask: Tensor) -> Tensor:
        return x.index_put((mask,), torch.zeros(rows, 2)).sin()

    compiled = torch.compile(write, backend="mosaic", options={"inner": "eager"})
    return [refusal(partial(f, x, mask), whole=True) for f in (write, compiled)]


def on_one_rank(p: int, read: str) -> str:
    """What is said where only the first rank reads something that is cut."""
    agreement.READ_WITHIN = 2.0
    ranks = mosaic.init(sp_size=p)
    x = mosaic.distribute(torch.arange(6.0), 0)
    said = ""
    if ranks.rank() == 0:
        said = refusal(lambda: READS[read](x), whole=True)
    dist.barrier()
    return said


READS: dict[str, Any] = {
    "mean": lambda x: x.mean(),
    "item": lambda x: x[1].item(),
    "full": lambda x: x.full_tensor(),
    "text": repr,
}


def written_patterns(p: int) -> tuple[list[bool], list[str]]:
    """A mask that waits is written to: nobody else looks at it; then a view does."""
    mosaic.init(sp_size=p)
    ids = mosaic.distribute(torch.arange(12).reshape(2, 6) // 4, 1)

    def same() -> Tensor:
        return ids[:, :, None] == ids[:, None]

    mask = same()
    before = mask[:, :3] & True  # its view is gone
    mask |= True
    seen = [bool(mask.all()), bool(before.all())]
    said = []
    for view in (lambda x: x[:, :3], lambda x: x.detach(), lambda x: x[:, None][:, 0]):
        for written in (0, 1):
            mask = same()
            pair = (mask, view(mask))
            try:
                pair[written].logical_or_(torch.tensor(True))
            except mosaic.MosaicError as error:
                said.append(str(error).splitlines()[0])
    return seen, said
