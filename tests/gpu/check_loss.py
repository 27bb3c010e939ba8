"""The loss of a head without its logits: right against float64, its memory and its time.

    python tests/gpu/check_loss.py [--small]

First relative errors of the loss and its gradients in bfloat16, beside those of linear and
cross_entropy, both against float64. Then of 16,384 tokens, hidden 4,096, vocabulary 128,256: the
memory that forward and backward take beyond what is given and the gradients, and milliseconds,
beside the same by torch.compile. Exits 1 if a result is further off than 1.2 x plain's.
``--small``: sizes for a CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.losses.op import TOKEN_LOSSES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, head)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def without(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    steps = "to float32" if hidden.dtype != torch.float64 else ""
    losses, _ = TOKEN_LOSSES(hidden, head, None, target, None, steps, -100, 0.0)
    return losses.sum() / (target != -100).sum()


def given(tokens: int, dim: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits as peaked as a trained model's."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, dim, device=DEVICE)
    head = torch.randn(classes, dim, device=DEVICE) * 3 * dim**-0.5
    target = torch.randint(0, classes, (tokens,), device=DEVICE)
    target[::7] = -100
    return hidden.bfloat16(), head.bfloat16(), target


def results(loss: Loss, hidden: Tensor, head: Tensor, target: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (hidden, head)]
    out = loss(*leaves, target)
    return [out.detach(), *torch.autograd.grad(out, leaves)]


def errors(loss: Loss, exact: list[Tensor], *inputs: Tensor) -> list[float]:
    found = results(loss, *inputs)
    return [
        float((x.double() - want).norm() / want.norm())
        for x, want in zip(found, exact, strict=True)
    ]


def measure(name: str, loss: Loss, *inputs: Tensor) -> None:
    """Prints GiB beyond inputs and gradients, and milliseconds of forward and backward."""
    for _ in range(3):
        results(loss, *inputs)
    given = sum(x.nbytes for x in inputs[:2])
    peak = 0.0
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results(loss, *inputs)
        peak = (torch.cuda.max_memory_allocated() - before - given) / 2**30
    times = []
    for _ in range(7):
        start = time.perf_counter()
        results(loss, *inputs)[0].item()
        times.append(1e3 * (time.perf_counter() - start))
    print(f"{name:<24} {sorted(times)[3]:9.1f} ms  {peak:6.2f} GiB beyond gradients", flush=True)


def main() -> int:
    small = "--small" in sys.argv
    wrong = 0
    for sizes in [(300, 64, 1000), (1000, 128, 5003), *([] if small else [(4096, 512, 50000)])]:
        inputs = given(*sizes)
        exact = results(plain, *(x.double() if x.is_floating_point() else x for x in inputs))
        ours, theirs = (errors(loss, exact, *inputs) for loss in (without, plain))
        is_wrong = any(a > 1.2 * b + 1e-6 for a, b in zip(ours, theirs, strict=True))
        wrong += is_wrong
        text = ", ".join(f"{a:.1e} ({b:.1e})" for a, b in zip(ours, theirs, strict=True))
        print(f"{sizes}: loss, dhidden, dhead {text} {'WRONG' if is_wrong else 'ok'}", flush=True)
    inputs = given(*((1024, 256, 8000) if small else (16384, 4096, 128256)))
    measure("without logits", without, *inputs)
    measure("without, compiled", torch.compile(without), *inputs)
    measure("plain, compiled", torch.compile(plain), *inputs)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
