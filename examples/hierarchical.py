"""Causal attention over ranks on several nodes, by seven methods: what is sent between nodes.

    python examples/hierarchical.py                        # 4 ranks as 2 nodes x 2
    torchrun --nproc-per-node=8 examples/hierarchical.py --node-size 4 --length 8192

Alone it starts 4 processes on this machine; its nodes are simulated, the numbers are not.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.nn.functional as F
from launch import device, launch
from measure import difference, largest
from torch import Tensor

import mosaic
from mosaic.attention.blocks import Band
from mosaic.attention.cost import Cost, cost_of, size
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.resolve import Machine, resolve

#: Of differences, by dtype; bfloat16 has 8 bits, and p ranks round in another order than one does.
TOLERANCE = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 0.1}
#: All ranks as one axis: rank = node * node size + place in the node.
ALL = "node,place"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, help="processes to start")
    parser.add_argument("--node-size", type=int, default=2, help="ranks of one node")
    parser.add_argument("--length", type=int, default=515, help="need not divide by anything")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float64")
    given = parser.parse_args()
    launch(run, given.ranks, given)


def methods(nodes: int, node_size: int) -> dict[str, mosaic.Method]:
    def hierarchical(intra: mosaic.api.methods.Intra) -> mosaic.Method:
        return mosaic.Hierarchical(node_size, intra=intra, mesh=ALL)

    return {
        "ring": mosaic.Ring(mesh=ALL),
        "ulysses": mosaic.Ulysses(mesh=ALL),
        f"mesh2d: {nodes} x {node_size}": mosaic.Mesh2D(nodes, node_size, mesh=ALL),
        "hierarchical, gathers in a node": hierarchical("local"),
        "hierarchical, a ring in a node": hierarchical("ring"),
        "hierarchical, heads in a node": hierarchical("ulysses"),
        # Almost the last one; here each is named by its mesh axis.
        "composed: heads in, ring between": mosaic.Composed(
            heads=mosaic.Ulysses(mesh="place"), sequence=mosaic.Ring(mesh="node")
        ),
    }


def run(given: argparse.Namespace) -> None:
    """What every rank does."""
    p, w = int(os.environ["WORLD_SIZE"]), given.node_size
    context = mosaic.init(mesh_shape=(p // w, w), mesh_axes=("node", "place"), device=device())
    q, k, v, dout = tensors(given, context.device)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    want = [out, *torch.autograd.grad(out, [q, k, v], dout)]
    problem = problem_of(q, k, p)
    rows, off = [], 0.0
    for name, method in methods(p // w, w).items():
        got = attended(q, k, v, dout, method)
        errors = [largest(difference([a], [b]), q.device) for a, b in zip(want, got, strict=True)]
        rows.append((name, cost(method, problem, w), errors))
        off = max(off, *errors)
    if context.rank(ALL) == 0:
        show(rows, given, p)
    if not off <= TOLERANCE[given.dtype]:
        raise SystemExit(f"the largest difference is {off:.1e}: too much for {given.dtype}")


def tensors(given: argparse.Namespace, device: torch.device) -> list[Tensor]:
    """Whole q, k, v and the gradient of the output: equal on all ranks."""
    torch.manual_seed(0)
    dtype, dim = getattr(torch, given.dtype), 64
    heads = (given.heads, given.kv_heads, given.kv_heads, given.heads)
    whole = [torch.randn(1, h, given.length, dim).to(device, dtype) for h in heads]
    return [x.requires_grad_() for x in whole[:3]] + whole[3:]


def attended(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, method: mosaic.Method) -> list[Tensor]:
    """Each rank attends with its part. Cutting and gathering are differentiable: out, dq, dk and dv
    come out whole. Zigzag gives all ranks as much to do under a causal mask."""
    p = mosaic.get_context().size(ALL)
    layout = mosaic.Layout.zigzag(q.shape[2], p)
    parts = [mosaic.shard_tensor(x, 2, layout=layout, mesh_axis=ALL) for x in (q, k, v)]
    part = mosaic.attention(*parts, method, causal=True, layout=layout)
    out = mosaic.gather(part, 2, layout=layout, mesh_axis=ALL)
    return [out, *torch.autograd.grad(out, [q, k, v], dout)]


def problem_of(q: Tensor, k: Tensor, p: int) -> AttentionProblem:
    batch, heads, n, dim = q.shape
    cut = mosaic.Layout.zigzag(n, p)
    sizes = (batch, heads, k.shape[1], dim, dim, q.element_size())
    return AttentionProblem(cut, cut, *sizes, band=Band(None, 0))


def cost(method: mosaic.Method, problem: AttentionProblem, node_size: int) -> Cost:
    """By the formulas to which Mosaic's tests hold the programs that run."""
    sizes = (("node", problem.p // node_size), ("place", node_size))
    strategy, _ = resolve(method, problem, Machine(sizes, node_size))
    return cost_of(strategy, problem, node_size)


def show(rows: list[tuple[str, Cost, list[float]]], given: argparse.Namespace, p: int) -> None:
    print(
        f"causal attention of {given.length} x {given.length} in {given.dtype}, {given.heads} "
        f"heads that share {given.kv_heads} KV heads,\non {p} ranks in nodes of {given.node_size}; "
        "bytes are sent by each rank in forward, differences are to one process\n\n"
        f"{'':<33}{'sent':>10}{'between nodes':>15}"
        + "".join(f"{name:>10}" for name in ("out", "dq", "dk", "dv"))
    )
    for name, found, errors in rows:
        print(
            f"{name:<33}{size(found.forward):>10}{size(found.between):>15}"
            + "".join(f"{error:>10.1e}" for error in errors)
        )


if __name__ == "__main__":
    main()
