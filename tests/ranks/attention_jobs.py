"""What ranks do in tests of attention and collectives: each job tries many cases, and gives the
error of each against the same mathematics in one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mosaic.api.methods import AllGather, Composed, Hierarchical, Mesh2D, Method, Ring, Ulysses
from mosaic.attention.blocks import CAUSAL, FULL, Band
from mosaic.attention.op import calls_of, sharded_attention, taken_off
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.resolve import Machine, strategy_of
from mosaic.attention.strategy import LOCAL, SPLIT_KV, Strategy
from mosaic.attention.tiles import TileProgram
from mosaic.attention.visit import Inputs
from mosaic.layout import Layout
from mosaic.runtime import comm
from mosaic.runtime.collectives import enter
from mosaic.runtime.rng import uniform_keep

F64 = torch.float64
BATCH, HEADS, DIM, V_DIM = 2, 6, 4, 3
MASKS = ("full", "causal", "bool", "float", "padding", "key_bias", "causal_bool", "finfo_min",
         "window", "documents", "documents_float", "tiles", "causal_tiles")  # fmt: skip
CUTS = ("even", "zigzag", "uneven", "empty")


#: A learned bias by distance and one of keys; two rows see nothing, in the way of transformers.
TILES = TileProgram.parse(
    "float64 d%2 d%3: sub.Tensor(%0, %1); clamp(%5, -4, 5); add.Tensor(%6, 4); embedding(%2, %7); "
    "add.Tensor(%8, %3); where.ScalarOther(%4, %9, -1e+250)"
)


class Case(NamedTuple):
    method: Method | str
    mask: str
    kv_heads: int
    cut: str
    n: int
    m: int
    dropout: float = 0.0
    sinks: bool = False
    lse: bool = False

    def __str__(self) -> str:
        return " ".join(str(field) for field in self)

    @property
    def band(self) -> Band:
        if self.mask.startswith("causal"):
            return CAUSAL
        return Band(4, 2) if self.mask == "window" else FULL


def methods_for(p: int) -> list[Method | str]:
    """Every method in every form that p ranks allow."""
    found: list[Method | str] = ["local", "split_kv", AllGather(), Ulysses(), Ring(stages=p)]
    found += [Ring(stages=stages) for stages in range(2, p)]
    grids = [(rows, p // rows) for rows in range(2, p) if p % rows == 0]
    found += [Mesh2D(rows, cols) for rows, cols in [*grids, (1, p)]]
    for nodes, size in grids:
        found += [Hierarchical(size, intra, "ring") for intra in ("local", "ring", "ulysses")]
        found += [Composed(Ulysses(mesh="h"), Ring(mesh=f"s{nodes}", stages=1))]
    if p in (4, 8):
        found += [Hierarchical(2, intra, "mesh2d") for intra in ("local", "mesh2d", "ring")]
        found += [Hierarchical(p // 2, "mesh2d", "ring")]
    return found


def cases(p: int, full: bool) -> Iterator[Case]:
    """All of them, or a sample in which every pair of mask and cut comes by for some method."""
    number = 0
    for method, mask, kv_heads in itertools.product(methods_for(p), MASKS, (HEADS, 2, 1)):
        for cut, (n, m) in itertools.product(CUTS, ((16, 16), (11, 11), (11, 17))):
            number += 1
            if full or number % 13 == 0:
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


def tile_leaves(case: Case) -> list[Tensor]:
    """Positions of keys and of queries, the table, the keys' bias, and which rows see something."""
    if not case.mask.endswith("tiles"):
        return []
    keys, queries = torch.arange(case.m).view(1, 1, 1, -1), torch.arange(case.n).view(1, 1, -1, 1)
    table = torch.randn(10, HEADS, dtype=F64)
    bias = torch.randn(BATCH, 1, 1, case.m, dtype=F64)
    return [keys, queries, table, bias, (queries != 0) & (queries != case.n // 2)]


def make_mask(case: Case) -> Tensor | None:
    n, m = case.n, case.m
    if case.mask in ("bool", "causal_bool"):
        seen = torch.rand(BATCH, 1, n, m) > 0.5
        seen[:, :, 1] = False
        return seen
    if case.mask.endswith("float"):
        return torch.randn(1, HEADS, n, m, dtype=F64)
    if case.mask == "finfo_min":  # two rows that see nothing, in the way of transformers
        mask = torch.zeros(BATCH, 1, n, m, dtype=F64)
        mask[:, :, [0, n // 2]] = torch.finfo(F64).min
        return mask
    if case.mask == "padding":
        return torch.arange(m).expand(BATCH, 1, 1, m) < torch.tensor([m - 3, 2]).view(-1, 1, 1, 1)
    return torch.randn(BATCH, 1, 1, m, dtype=F64) if case.mask == "key_bias" else None


def documents(case: Case) -> tuple[Tensor, Tensor]:
    """Ids (batch, n) and (batch, m); one query's document has no keys."""
    ids = torch.tensor([[0, 3, 7], [0, 5, 6]])
    queries, keys = (torch.searchsorted(ids, torch.arange(size).expand(2, size).contiguous(),
                                        right=True) for size in (case.n, case.m))  # fmt: skip
    queries[0, 2] = 9
    return queries, keys


def plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: list[Tensor], case: Case,
    seed: Tensor,
) -> Tensor:  # fmt: skip
    """Attention in one process: (batch, heads, n, v_dim), and one column more of log-sum-exps."""
    k, v = (x.repeat_interleave(HEADS // case.kv_heads, 1) for x in (k, v))
    scores = q @ k.mT * 0.5
    seen = torch.ones(case.n, case.m, dtype=torch.bool)
    if case.band.right is not None:
        seen = seen.tril(case.band.right)
    if case.band.left is not None:
        seen = seen.triu(-case.band.left)
    for queries, keys in [documents(case)] if case.mask.startswith("documents") else []:
        seen = seen & (queries[:, None, :, None] == keys[:, None, None, :])
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
    columns = [x.view(-1, 1, 1).expand(BATCH, HEADS, case.n, 1) for x in sinks]
    scores = torch.cat([scores.masked_fill(~seen, -1e300), *columns], -1)
    shares = scores.softmax(-1)
    weights = shares[..., : case.m] * seen
    if case.dropout:
        indices = [torch.arange(size) for size in weights.shape]
        weights = weights * uniform_keep(seed, 5, indices, case.dropout, F64)
    out = weights @ v
    if not case.lse:
        return out
    # torch's own gradient is exp(scores - lse): 1 where a row has nothing but the lowest number.
    exact = (shares.detach() * (scores - scores.detach())).sum(-1, True)
    return torch.cat([out, scores.logsumexp(-1, True).detach() + exact], -1)


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
    documents: tuple[Tensor | None, Tensor | None]
    sinks: bool
    lse: bool


def problem(case: Case, group: str) -> Problem:
    torch.manual_seed(3)
    p, rank = dist.get_world_size(), dist.get_rank()
    shapes = [(HEADS, case.n, DIM), (case.kv_heads, case.m, DIM), (case.kv_heads, case.m, V_DIM)]
    whole = [torch.randn(BATCH, *shape, dtype=F64) for shape in shapes]
    mask, seed = make_mask(case), torch.tensor(11)
    inputs = [*whole, *([] if mask is None else [mask]), *tile_leaves(case)]
    inputs += [torch.randn(HEADS, dtype=F64)] if case.sinks else []
    q, k, v, *rest = leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    rest, sinks = (rest[:-1], rest[-1:]) if case.sinks else (rest, [])
    made = TILES(*rest) if case.mask.endswith("tiles") else rest[0] if rest else None
    out = plain(q, k, v, made, sinks, case, seed)
    dout = torch.randn(out.shape, dtype=F64)
    grads = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], dout)
    query, key = layout(case.cut, case.n, p), layout(case.cut, case.m, p)
    key = Layout.whole(case.m, p) if case.method == "local" else key
    query = Layout.whole(case.n, p) if case.method == "split_kv" else query
    has_rows = mask is not None and mask.shape[2] > 1
    tile = str(TILES) if case.mask.endswith("tiles") else ""
    chosen = strategy(case, query, key, has_rows)
    plan = AttentionPlan(
        chosen, rank, group, query, key, case.band, 0.5, case.dropout, site=5, tile=tile
    )
    rows, keys = query.indices(rank), key.indices(rank)
    ids = documents(case) if case.mask.startswith("documents") else (None, None)
    known = (dout, out.detach(), list(grads), seed, ids, case.sinks, case.lse)
    return Problem(inputs, plan, rows, keys, *known)


def strategy(case: Case, query: Layout, key: Layout, has_rows: bool) -> Strategy:
    if isinstance(case.method, str):
        return {"local": LOCAL, "split_kv": SPLIT_KV}[case.method]
    sizes: tuple[tuple[str, int], ...] = ()
    if isinstance(case.method, Composed):
        nodes = int(case.method.sequence.mesh[1:])
        sizes = (("h", key.p // nodes), (case.method.sequence.mesh, nodes))
    dims = (BATCH, HEADS, case.kv_heads, DIM, V_DIM)
    given = AttentionProblem(query, key, *dims, itemsize=8, has_rows=has_rows)
    return strategy_of(case.method, given, Machine(sizes))[0]


def my_rows(x: Tensor, rows: list[int]) -> Tensor:
    return x if is_of_all_rows(x) else x[:, :, rows]


def is_of_all_rows(x: Tensor) -> bool:
    """Sinks, or one row of a mask for all queries."""
    return x.ndim < 4 or x.shape[2] == 1


def local_inputs(known: Problem) -> list[Tensor]:
    q, k, v, *rest = known.inputs
    parts = [q[:, :, known.rows], k[:, :, known.keys], v[:, :, known.keys]]
    parts += rest if known.plan.tile else [my_rows(x, known.rows) for x in rest]
    return [x.clone().requires_grad_(x.is_floating_point()) for x in parts]


def op_of(known: Problem) -> Callable[..., Tensor]:
    """The op with this problem's plan."""
    plan, group = known.plan, known.plan.group
    seed = known.seed if plan.dropout else None
    calls = calls_of(plan, known.inputs[0].shape[1], known.inputs[1].shape[1])
    is_local, documents = plan.strategy == LOCAL, known.documents

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        if is_local:  # the keys are whole, and used by every rank's queries
            k, v = enter(k, group), enter(v, group)
        rest, sinks = (rest[:-1], rest[-1]) if known.sinks else (rest, None)
        mask, leaves = (None, rest) if plan.tile else (rest[0] if rest else None, ())
        inputs = Inputs(mask, *documents, seed, leaves, sinks)
        out = sharded_attention(q, k, v, inputs, calls, known.lse)
        if known.lse:
            with torch.no_grad():
                missing = taken_off(q, k, v, inputs, plan.encode())
            out = out if missing is None else out + missing
        return out

    return run


def expected(known: Problem) -> list[Tensor]:
    """This rank's part of the output and of every gradient."""
    dq, dk, dv, *rest = known.grads
    parts = [
        known.out[:, :, known.rows],
        dq[:, :, known.rows],
        dk[:, :, known.keys],
        dv[:, :, known.keys],
    ]
    return parts + (rest if known.plan.tile else [my_rows(x, known.rows) for x in rest])


def found(known: Problem, fn: Callable[..., Tensor]) -> list[Tensor]:
    leaves = local_inputs(known)
    out = fn(*leaves)
    grads = torch.autograd.grad(
        out, [x for x in leaves if x.requires_grad], known.dout[:, :, known.rows], allow_unused=True
    )
    masks, sinks = (grads[3:-1], grads[-1:]) if known.sinks else (grads[3:], ())
    everywhere = known.plan.strategy.everywhere
    for share, whole in zip(masks, known.inputs[3:], strict=False):
        if known.plan.tile or everywhere or is_of_all_rows(whole):  # a rank may hold one row
            dist.all_reduce(share)
    for share in () if everywhere else sinks:  # where every rank has all rows, all of it
        dist.all_reduce(share)
    return [out.detach(), *grads]


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


def all_cases(full: bool = False) -> dict[str, float]:
    errors = {}
    for case in cases(dist.get_world_size(), full):
        known = problem(case, group_name())
        got = found(known, op_of(known))
        errors[str(case)] = difference(got, expected(known))
    return errors


def combed_cases() -> dict[str, float]:
    """With two and more evenly spaced chunks as one view, which is for many ranks otherwise."""
    before, comm.MANY = comm.MANY, 2
    try:
        return all_cases()
    finally:
        comm.MANY = before


def dropout_cases() -> dict[str, float]:
    errors = {}
    p = dist.get_world_size()
    for method, mask, cut in itertools.product(methods_for(p), ("causal", "float"), CUTS[1::2]):
        case = Case(method, mask, 2, cut, 16, 16, dropout=0.3)
        known = problem(case, group_name())
        got = found(known, op_of(known))
        errors[str(case)] = difference(got, expected(known))
    return errors


def sinks_cases(full: bool = False) -> dict[str, float]:
    errors = {}
    p = dist.get_world_size()
    masks = ("full", "causal", "bool", "float", "window", "documents", "tiles")
    options = itertools.product(methods_for(p), masks, (HEADS, 2, 1), CUTS, (0.0, 0.3))
    for number, (method, mask, kv_heads, cut, dropout) in enumerate(options):
        if full or number % 11 == 0:
            case = Case(method, mask, kv_heads, cut, 11, 17, dropout, sinks=True)
            known = problem(case, group_name())
            errors[str(case)] = difference(found(known, op_of(known)), expected(known))
    return errors


# --- compiled, then lowered -----------------------------------------------------------------------


LOWERED = {
    "few": (
        (Ring(stages=3), "causal", 0.0),
        (Ring(stages=2), "float", 0.3),
        (Mesh2D(1, 3), "tiles", 0.0),
        (Ulysses(), "causal_tiles", 0.3),
        ("local", "float", 0.0),
    ),
    "others": (
        (AllGather(), "causal", 0.0),
        (Mesh2D(1, 3), "causal", 0.3),
        (Ulysses(), "documents", 0.0),
    ),
    "one": ((Ring(stages=3), "causal", 0.0),),
}


class Compiled(NamedTuple):
    error: float
    saved: list[tuple[str, tuple[int, ...]]]
    targets: dict[str, list[str]]


def lowered_cases(inner: str, which: str) -> dict[str, Compiled]:
    """A small program around the op, through torch.compile, AOTAutograd and the lowering passes."""
    results = {}
    # Inductor's C++ takes long; with equal shards the ranks share what they compile.
    n, m = (11, 17) if inner == "eager" else (12, 12)
    for method, mask, dropout in LOWERED[which]:
        heads = HEADS if method == Ulysses() else 2
        case = Case(method, mask, heads, "zigzag", n, m, dropout)
        known = problem(case, group_name())
        backend, seen = lowering_backend(inner)
        torch._dynamo.reset()
        fn = torch.compile(op_of(known), backend=backend, fullgraph=True)
        got = found(known, fn)
        results[str(case)] = Compiled(difference(got, expected(known)), seen.pop("saved", []), seen)
    return results


def gathers_at_once(graph: torch.fx.Graph) -> int:
    """The most all-gathers that have started and are not waited for."""
    flying: set[torch.fx.Node] = set()
    most = 0
    for node in graph.nodes:
        if "all_gather_into_tensor" in str(node.target):
            flying.add(node)
        elif "wait_tensor" in str(node.target):
            flying.discard(node.args[0])
        most = max(most, len(flying))
    return most


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
            assert gathers_at_once(gm.graph) <= 1, "gloo breaks with two all-gathers in flight"
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
