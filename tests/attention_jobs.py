"""What ranks do in tests of attention and collectives: each job tries many cases, and gives the
error of each against the same mathematics in one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import mosaic.attention.op  # noqa: F401 (registers the ops)
from mosaic.attention.plan import AttentionPlan
from mosaic.collectives import enter
from mosaic.layout import Layout
from mosaic.random import uniform_keep

F64 = torch.float64
BATCH, HEADS, DIM, V_DIM = 2, 4, 4, 4


class Case(NamedTuple):
    method: str
    mask: str
    kv_heads: int
    cut: str
    n: int
    m: int
    dropout: float = 0.0

    def __str__(self) -> str:
        return " ".join(str(field) for field in self)


def cases(methods: tuple[str, ...]) -> Iterator[Case]:
    names = ("causal", "full", "bool", "float", "padding", "key_bias", "causal_bool", "finfo_min")
    cuts = ("even", "zigzag", "uneven", "empty")
    for method, mask, kv_heads, cut in itertools.product(methods, names, (HEADS, 2), cuts):
        for n, m in ((16, 16), (11, 17)):
            yield Case(method, mask, kv_heads, cut, n, m)


def layout(cut: str, n: int, p: int) -> Layout:
    if cut == "zigzag":
        return Layout.zigzag(n, p)
    if cut == "uneven":  # in no order, and two intervals on rank 0
        bounds = [0, 1, *(2 + (n - 2) * (i + 1) ** 2 // p**2 for i in range(p))]
        parts = [[(a, b)] for a, b in itertools.pairwise(bounds)]
        first, *others = parts
        return Layout.of(n, [parts[-1] + first, *others[:-1]][:p])
    if cut == "empty" and p > 1:
        even = Layout.even(n, p - 1).ranks
        return Layout(n, (*even[:1], (), *even[1:]))
    return Layout.even(n, p)


def make_mask(case: Case) -> Tensor | None:
    n, m = case.n, case.m
    if case.mask in ("bool", "causal_bool"):
        seen = torch.rand(BATCH, 1, n, m) > 0.5
        seen[:, :, 1] = False
        return seen
    if case.mask == "float":
        return torch.randn(1, HEADS, n, m, dtype=F64)
    if case.mask == "finfo_min":  # two rows that see nothing, in the way of transformers
        mask = torch.zeros(BATCH, 1, n, m, dtype=F64)
        mask[:, :, [0, n // 2]] = torch.finfo(F64).min
        return mask
    if case.mask == "padding":
        return torch.arange(m).expand(BATCH, 1, 1, m) < torch.tensor([m - 3, 2]).view(-1, 1, 1, 1)
    return torch.randn(BATCH, 1, 1, m, dtype=F64) if case.mask == "key_bias" else None


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, case: Case, seed: Tensor) -> Tensor:
    """Attention in one process: (batch, heads, n, v_dim)."""
    k, v = (x.repeat_interleave(HEADS // case.kv_heads, 1) for x in (k, v))
    scores = q @ k.mT * 0.5
    seen = torch.ones(case.n, case.m, dtype=torch.bool)
    seen = seen.tril() if case.mask.startswith("causal") else seen
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
    weights = scores.masked_fill(~seen, -1e300).softmax(-1) * seen
    if case.dropout:
        indices = [torch.arange(size) for size in weights.shape]
        weights = weights * uniform_keep(seed, 5, indices, case.dropout, F64)
    return weights @ v


class Problem(NamedTuple):
    """Whole tensors, this rank's parts of them, and what it should find."""

    inputs: list[Tensor]
    plan: AttentionPlan
    rows: list[int]
    keys: list[int]
    dout: Tensor
    out: Tensor
    grads: list[Tensor]
    seed: Tensor


def problem(case: Case, group: str) -> Problem:
    torch.manual_seed(3)
    p, rank = dist.get_world_size(), dist.get_rank()
    shapes = [(HEADS, case.n, DIM), (case.kv_heads, case.m, DIM), (case.kv_heads, case.m, V_DIM)]
    whole = [torch.randn(BATCH, *shape, dtype=F64) for shape in shapes]
    mask, seed = make_mask(case), torch.tensor(11)
    inputs = [*whole, *([] if mask is None else [mask])]
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = plain(*leaves[:3], None if mask is None else leaves[3], case, seed)
    dout = torch.randn(out.shape, dtype=F64)
    grads = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], dout)
    query, key = layout(case.cut, case.n, p), layout(case.cut, case.m, p)
    key = Layout.whole(case.m, p) if case.method == "local" else key
    causal = case.mask.startswith("causal")
    plan = AttentionPlan(case.method, rank, group, query, key, causal, 0.5, case.dropout, site=5)
    rows, keys = query.indices(rank), key.indices(rank)
    return Problem(inputs, plan, rows, keys, dout, out.detach(), list(grads), seed)


def my_rows(x: Tensor, rows: list[int]) -> Tensor:
    return x if x.shape[2] == 1 else x[:, :, rows]


def local_inputs(known: Problem) -> list[Tensor]:
    q, k, v, *mask = known.inputs
    parts = [q[:, :, known.rows], k[:, :, known.keys], v[:, :, known.keys]]
    parts += [my_rows(x, known.rows) for x in mask]
    return [x.clone().requires_grad_(x.is_floating_point()) for x in parts]


def op_of(known: Problem) -> Callable[..., Tensor]:
    """The op with this problem's plan."""
    plan, group, local = known.plan.encode(), known.plan.group, known.plan.method == "local"
    seed = known.seed if known.plan.dropout else None

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if local:  # the keys are whole, and used by every rank's queries
            k, v = enter(k, group), enter(v, group)
        return torch.ops.mosaic.attention(q, k, v, mask, seed, plan)[0]

    return run


def expected(known: Problem) -> list[Tensor]:
    """This rank's part of the output and of every gradient."""
    dq, dk, dv, *dmask = known.grads
    parts = [
        known.out[:, :, known.rows],
        dq[:, :, known.rows],
        dk[:, :, known.keys],
        dv[:, :, known.keys],
    ]
    return parts + [my_rows(x, known.rows) for x in dmask]


def found(known: Problem, fn: Callable[..., Tensor]) -> list[Tensor]:
    leaves = local_inputs(known)
    out = fn(*leaves)
    grads = torch.autograd.grad(
        out, [x for x in leaves if x.requires_grad], known.dout[:, :, known.rows], allow_unused=True
    )
    got = [out.detach(), *grads]
    if len(got) == 5 and known.inputs[3].shape[2] == 1:  # one row of mask for all queries: shares
        dist.all_reduce(got[4])
    return got


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest error; infinite where shapes differ or something is not finite."""
    if [x.shape for x in got] != [x.shape for x in want]:
        return float("inf")
    errors = [
        (a - b).abs().max().nan_to_num(torch.inf).item()
        for a, b in zip(got, want, strict=True)
        if a.numel()
    ]
    return max(errors, default=0.0)


def group_name() -> str:
    return dist.group.WORLD.group_name


def all_cases(methods: tuple[str, ...]) -> dict[str, float]:
    errors = {}
    for case in cases(methods):
        known = problem(case, group_name())
        got = found(known, op_of(known))
        errors[str(case)] = difference(got, expected(known))
    return errors


def dropout_cases() -> dict[str, float]:
    errors = {}
    for method, mask, cut in itertools.product(
        ("ring", "all_gather", "local"), ("causal", "float"), ("zigzag", "empty")
    ):
        case = Case(method, mask, 2, cut, 16, 16, dropout=0.3)
        known = problem(case, group_name())
        got = found(known, op_of(known))
        errors[str(case)] = difference(got, expected(known))
    return errors


# --- compiled, then lowered -----------------------------------------------------------------------


LOWERED = (
    ("ring", "causal", 0.0),
    ("ring", "float", 0.3),
    ("all_gather", "causal", 0.0),
    ("local", "float", 0.0),
)


class Compiled(NamedTuple):
    error: float
    saved: list[tuple[str, tuple[int, ...]]]
    targets: dict[str, list[str]]


def lowered_cases(inner: str) -> dict[str, Compiled]:
    """A small program around the op, through torch.compile, AOTAutograd and the lowering passes."""
    results = {}
    # Inductor's C++ takes long; with equal shards the ranks share what they compile.
    chosen, n, m = (LOWERED, 11, 17) if inner == "eager" else (LOWERED[:1], 12, 12)
    for method, mask, dropout in chosen:
        case = Case(method, mask, 2, "zigzag", n, m, dropout)
        known = problem(case, group_name())
        backend, seen = lowering_backend(inner)
        torch._dynamo.reset()
        fn = torch.compile(op_of(known), backend=backend, fullgraph=True)
        got = found(known, fn)
        results[str(case)] = Compiled(difference(got, expected(known)), seen.pop("saved", []), seen)
    return results


def lowering_backend(inner: str):
    """Dynamo -> AOTAutograd -> lowering -> eager or Inductor; and what it saw on the way."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import compile_fx_inner

    from mosaic.passes.lower_attention import lower_attention
    from mosaic.passes.lower_collectives import lower_collectives
    from mosaic.passes.overlap import overlap
    from mosaic.torch_private import decompositions_for_inductor

    seen: dict = {}

    def compiler(name: str):
        def compile_graph(gm, example_inputs):
            if name == "forward":
                (output,) = (node for node in gm.graph.nodes if node.op == "output")
                results = [x for x in output.args[0] if x is not None]
                seen["saved"] = [(x.op, tuple(x.meta["val"].shape)) for x in results[1:]]
            for step in (lower_collectives, lower_attention, overlap):
                step(gm.graph, None)
            gm.graph.lint()
            gm.recompile()
            seen[name] = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
            if inner == "eager":
                return make_boxed_func(gm.forward)
            return compile_fx_inner(gm, example_inputs, is_backward=name == "backward")

        return compile_graph

    backend = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        decompositions=decompositions_for_inductor() if inner == "inductor" else {},
        partition_fn=min_cut_rematerialization_partition,
    )
    return backend, seen
