"""Attention over time and space at once, both cut: every moment of every patch is a token.

    python examples/video_2d.py                          # 4 processes, a grid of 2 x 2
    torchrun --nproc-per-node=4 examples/video_2d.py --times 64 --places 1024

Twice: a plain model, compiled; and the same model with ``mosaic.MultiAxisAttention2D``, eager.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import device, launch
from measure import kept_for_backward, largest, mebibytes, relative
from models.video import CHANNELS, EMBED, HEADS, Attention, Video
from torch import Tensor, nn

import mosaic

#: rank = place along "rows" * 2 + place along "cols".
GRID, AXES, ALL = (2, 2), ("rows", "cols"), "rows,cols"
TOLERANCE = 1e-10  # in float64
Outcome = tuple[Tensor, list[Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--places", type=int, default=49)
    parser.add_argument("--inner", choices=["eager", "inductor"], default="eager")
    given = parser.parse_args()
    launch(run, 4, given)


def run(given: argparse.Namespace) -> None:
    """What every rank does."""
    context = mosaic.init(mesh_shape=GRID, mesh_axes=AXES, device=device())
    torch.manual_seed(0)
    model = Video(Attention).to(context.device).double()
    shape = (1, given.times, given.places, CHANNELS)
    clip, clean = (torch.randn(shape).to(context.device).double() for _ in range(2))
    first = context.rank(ALL) == 0
    if first:
        print(f"{given.times} times x {given.places} places over {GRID[0]} x {GRID[1]} ranks\n")
    spec = mosaic.ShardingSpec(
        inputs={"clip": "batch times places channels"},
        axes={"times": mosaic.Ring(mesh="rows"), "places": mosaic.Ring(mesh="cols")},
    )
    plan = mosaic.explain(model, clip, spec=spec)
    options = {"spec": spec, "inner": given.inner}
    compiled = torch.compile(model, backend="mosaic", options=options)
    wholes = [*model.parameters(), clip, clean]

    want, alone = kept_for_backward(lambda: plain(model, model, clip, clean), wholes)
    dist.barrier()
    plain(compiled, model, clip, clean)  # compiles
    by_mosaic = kept_for_backward(lambda: plain(compiled, model, clip, clean), wholes)
    by_modules = eager(model, clip, clean)
    if first:
        for found in plan.attentions:
            tokens = f"{found.queries} x {found.keys}"
            print(f"{found.source}  {found.axis}, {tokens}  {found.method}")
        print(
            f"\n{'':<26}{'kept by a rank':>16}{'of one process':>16}{'loss':>10}{'gradients':>11}"
        )
        print(f"{'one process':<26}{mebibytes(alone):>16}")
    off = [
        compare(name, want, *results, alone, first)
        for name, results in (("compiled", by_mosaic), ("MultiAxisAttention2D", by_modules))
    ]
    if not max(off) <= TOLERANCE:
        raise SystemExit(f"the largest difference is {max(off):.1e}: too much for float64")


def plain(called: Callable[..., Tensor], model: Video, clip: Tensor, clean: Tensor) -> Outcome:
    loss = F.mse_loss(called(clip), clean)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def eager(model: Video, clip: Tensor, clean: Tensor) -> tuple[Outcome, int]:
    """A model written for shards: every rank works on its tile of the clip, and has its part of the
    loss. The modules sum their own gradients over the ranks, ``sum_gradients`` those of the rest.
    """
    rows, cols = (
        mosaic.Layout.even(n, p) for n, p in zip(clip.shape[1:3], GRID, strict=True)
    )  # known to all, so that parts need not be equal
    layout = mosaic.Layout.grid(rows, cols)

    def attention() -> nn.Module:
        return mosaic.MultiAxisAttention2D(EMBED, HEADS, 1, 2, GRID, layout=layout, mesh=ALL)

    sharded = Video(attention).to(clip)
    sharded.load_state_dict(model.state_dict())
    mosaic.sum_gradients(sharded, ALL)

    def tile(x: Tensor) -> Tensor:
        return mosaic.shard_tensor(mosaic.shard_tensor(x, 1, mesh_axis="rows"), 2, mesh_axis="cols")

    part, target = tile(clip), tile(clean)

    def step() -> Outcome:
        loss = F.mse_loss(sharded(part), target, reduction="sum") / clean.numel()
        loss.backward()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        return whole, [p.grad for p in sharded.parameters()]

    return kept_for_backward(step, [*sharded.parameters(), part, target])


def compare(
    name: str, want: Outcome, got: Outcome, kept: float, alone: float, first: bool
) -> float:
    """The largest difference to one process, on any rank."""
    loss = largest(relative([want[0]], [got[0]]), want[0].device)
    gradients = largest(relative(want[1], got[1]), want[0].device)
    kept = largest(kept, want[0].device)
    if first:
        share = f"{kept / alone:.1%}"
        print(f"{name:<26}{mebibytes(kept):>16}{share:>16}{loss:>10.1e}{gradients:>11.1e}")
    return max(loss, gradients)


if __name__ == "__main__":
    main()
