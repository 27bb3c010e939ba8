"""What ranks do in tests of the eager modules: each job gives the largest error of every case,
against the same module (or plain attention) in one process on whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from attention_jobs import difference
from torch import Tensor, nn

import mosaic
from mosaic import Layout

F64 = torch.float64
EMBED, HEADS = 8, 4


def gradients(outputs: Tensor, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, inputs, dout))


def layouts(n: int, p: int) -> dict[str, Layout | None]:
    """Equal shards (no layout), uneven ones, one empty, and zigzag."""
    found: dict[str, Layout | None] = {"equal": None}
    found["uneven"] = Layout.of(
        n, [[(0, n - p + 1)], *([(n - r, n - r + 1)] for r in range(p - 1, 0, -1))]
    )
    found["empty"] = Layout(n, (*Layout.even(n, max(p - 1, 1)).ranks, ())[:p])
    return {**found, "zigzag": Layout.zigzag(n, p)}


def mine(x: Tensor, dim: int, layout: Layout, rank: int) -> Tensor:
    return x.index_select(dim, torch.tensor(layout.indices(rank), dtype=torch.int64))


# --- mosaic.attention -----------------------------------------------------------------------------


def methods(p: int) -> list[Any]:
    found = ["auto", "ring", "all_gather", "ulysses", mosaic.Mesh2D(1, p)]
    nodes = [mosaic.Mesh2D(2, 2), mosaic.Hierarchical(2), mosaic.Hierarchical(2, "ulysses")]
    return found + (nodes if p == 4 else [])


def functional(p: int) -> dict[str, float]:
    """q, k, v of (batch, heads, n, dim) with fewer KV heads and another value dim."""
    context = mosaic.init(sp_size=p)
    torch.manual_seed(1)
    n, rank = 8, context.rank()
    shapes = ((2, 4, n, 6), (2, 2, n, 6), (2, 2, n, 3))
    whole = [torch.randn(s, dtype=F64, requires_grad=True) for s in shapes]
    bias = torch.randn(1, 4, 1, n, dtype=F64, requires_grad=True)
    rows = torch.randn(2, 1, n, n, dtype=F64, requires_grad=True)
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    band = torch.ones(n, n, dtype=torch.bool)
    cases: dict[str, tuple[dict, Tensor | None, Tensor]] = {
        "causal": ({"causal": True}, None, band.tril()),
        "window": ({"window": (2, 1)}, None, band.tril(1).triu(-2)),
        "causal window": ({"causal": True, "window": (2, None)}, None, band.tril().triu(-2)),
        "bias": ({"scale": 0.3}, bias, band),
        "rows": ({"causal": True}, rows, band.tril()),
        "documents": ({"query_documents": ids}, None, ids[:, :, None] == ids[:, None, :]),
    }
    dout, errors = torch.randn(2, 4, n, 3, dtype=F64), {}
    for name, (options, mask, seen) in cases.items():
        keep = torch.zeros(seen.shape, dtype=F64).masked_fill(~seen, float("-inf"))
        q, k, v = whole
        want = F.scaled_dot_product_attention(
            q, k, v, keep if mask is None else keep + mask,
            scale=options.get("scale"), enable_gqa=True,
        )  # fmt: skip
        leaves = [*whole] + ([] if mask is None else [mask])
        grads = gradients(want, leaves, dout)
        for cut, layout in layouts(n, p).items():
            held = layout or Layout.even(n, p)
            dims = [2, 2, 2] + [2 if mask is rows else -1] * (mask is not None)
            if mask is not None and 1 in held.lengths:  # refused: see tests/errors
                continue
            parts = [
                (x if d < 0 else mine(x, d, held, rank)).detach().clone().requires_grad_()
                for x, d in zip(leaves, dims, strict=True)
            ]
            for method in methods(p):
                options_here = {**options, "mask": parts[3] if mask is not None else None}
                out = mosaic.attention(*parts[:3], method, layout=layout, **options_here)
                got = gradients(out, parts, mine(dout, 2, held, rank))
                expected = [
                    x if d < 0 else mine(x, d, held, rank)
                    for x, d in zip([want, *grads], [2, *dims], strict=True)
                ]
                errors[f"{name} {cut} {method}"] = difference([out, *got], expected)
    return errors


# --- modules --------------------------------------------------------------------------------------


def reference(module: nn.Module, build: Callable[[Any], nn.Module]) -> nn.Module:
    """The same module where everything is local, with the same parameters."""
    local = build("local")
    local.load_state_dict(module.state_dict())
    return local


def compared(
    module: nn.Module,
    local: nn.Module,
    whole: list[Tensor],
    dims: list[int],
    held: list[Layout],
    options: dict[str, Any],
    run: Callable[..., Tensor] | None = None,
) -> float:
    """Outputs, gradients of inputs and of parameters."""
    rank = mosaic.get_context().rank()
    leaves = [x.clone().requires_grad_() for x in whole]
    want = local(*leaves)
    dout = torch.randn(want.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    grads = gradients(want, [*leaves, *local.parameters()], dout)
    parts = [
        mine(x, d, layout, rank).clone().requires_grad_()
        for x, d, layout in zip(whole, dims, held, strict=True)
    ]
    out = (run or module)(*parts, **options)
    got = gradients(out, [*parts, *module.parameters()], mine(dout, dims[0], held[0], rank))
    count = len(parts)
    cut = [
        mine(x, d, layout, rank)
        for x, d, layout in zip(
            [want, *grads[:count]], [dims[0], *dims], [held[0], *held], strict=True
        )
    ]
    return difference([out, *got], [*cut, *grads[count:]])


def backends(p: int) -> list[tuple[Any, dict[str, Any]]]:
    found = [(name, {}) for name in ("ring", "ulysses", "auto", mosaic.AllGather())]
    grids = [(1, p)] + [(2, 2)] * (p == 4)
    return [*found, *(("mesh2d", {"mesh_shape": grid}) for grid in grids)]


def multi_axis(p: int) -> dict[str, float]:
    mosaic.init(sp_size=p)
    torch.manual_seed(1)
    n, errors = 8, {}
    for axis, shape in ((1, (2, n, 3, EMBED)), (-3, (2, n, 3, EMBED)), (0, (n, EMBED))):
        x = torch.randn(shape, dtype=F64)
        for number, (backend, options) in enumerate(backends(p)):
            shape_of = {
                "causal": number % 2 == 0,
                "num_kv_heads": (HEADS, 2, 1)[number % 3],
                "bias": number != 1,
            }

            def build(name, axis=axis, shape_of=shape_of, **more):
                return mosaic.MultiAxisAttention(
                    EMBED, HEADS, axis, name, **shape_of, **more
                ).double()

            module = build(backend, **options)
            for cut, layout in layouts(n, p).items():
                held = layout or Layout.even(n, p)
                errors[f"{axis} {backend} {cut}"] = compared(
                    module, reference(module, build), [x], [axis], [held], {"layout": layout}
                )
    return errors


def cross(p: int) -> dict[str, float]:
    """Keys that are cut, that are whole, and whole queries."""
    mosaic.init(sp_size=p)
    torch.manual_seed(1)
    n, m, errors = 8, 12, {}
    q, kv = torch.randn(2, n, 3, EMBED, dtype=F64), torch.randn(2, 3, m, EMBED, dtype=F64)
    whole = Layout.whole
    cases = {
        "both": (None, None),
        "uneven": (layouts(n, p)["uneven"], layouts(m, p)["zigzag"]),
        "whole keys": (Layout.even(n, p), whole(m, p)),
        "whole queries": (whole(n, p), Layout.zigzag(m, p)),
        "all whole": (whole(n, p), whole(m, p)),
    }
    for backend, options in backends(p):

        def build(name, **more):
            return mosaic.CrossAxisAttention(EMBED, HEADS, 1, 2, name, **more).double()

        module = build(backend, **options)
        local = reference(module, build)
        for name, (query, key) in cases.items():
            held = [query or Layout.even(n, p), key or Layout.even(m, p)]
            given = {"layout": query, "key_layout": key}
            errors[f"{backend} {name}"] = compared(module, local, [q, kv], [1, 2], held, given)
    return errors


def two_axes(p: int) -> dict[str, float]:
    """x (batch, n1, 2, n2, embed): tokens are n1 x n2. Against one long axis."""
    context = mosaic.init(sp_size=p)
    torch.manual_seed(1)
    errors, rank = {}, context.rank()
    grids = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 4: [(2, 2), (4, 1)]}[p]
    for rows, cols in grids:
        for causal in (False, True):
            for name, (n1, n2) in {"equal": (4, 6 if cols < 4 else 8), "uneven": (5, 3)}.items():
                module = mosaic.MultiAxisAttention2D(
                    EMBED, HEADS, 1, -2, (rows, cols), causal=causal
                ).double()
                local = mosaic.MultiAxisAttention(EMBED, HEADS, 1, causal=causal).double()
                local.load_state_dict(module.state_dict())
                a, b = Layout.even(n1, rows), Layout.even(n2, cols)
                x = torch.randn(2, n1, 2, n2, EMBED, dtype=F64, requires_grad=True)
                tokens = x.transpose(2, 3).flatten(1, 2)
                want = local(tokens).unflatten(1, (n1, n2)).transpose(2, 3)
                dout = torch.randn(want.shape, dtype=F64)
                grads = gradients(want, [x, *local.parameters()], dout)

                def cut(t, a=a, b=b, cols=cols):
                    return mine(mine(t, 1, a, rank // cols), 3, b, rank % cols)

                part = cut(x).detach().clone().requires_grad_()
                out = module(part, layout=Layout.grid(a, b) if name == "uneven" else None)
                got = gradients(out, [part, *module.parameters()], cut(dout))
                errors[f"{rows} x {cols} {causal} {name}"] = difference(
                    [out, *got], [cut(want), cut(grads[0]), *grads[1:]]
                )
    return errors


def plain_modules(p: int) -> dict[str, float]:
    """ComposedAttention and HierarchicalAttention: shard, attend, gather."""
    mosaic.init(sp_size=p)
    torch.manual_seed(1)
    modules: dict[str, nn.Module] = {}
    for heads, sequence in {1: [(1, 1)], 2: [(1, 2), (2, 1)], 4: [(2, 2), (1, 4), (4, 1)]}[p]:
        for parallel in (True, False):
            for along in ("ring", "all_gather", mosaic.Mesh2D(1, sequence if parallel else p)):
                name = f"composed {heads} x {sequence} {parallel} {along}"
                shape = (heads, sequence)
                modules[name] = mosaic.ComposedAttention(shape, parallel, along, causal=parallel)
    for size in {1: [1], 2: [1, 2], 4: [2, 4]}[p]:
        for inter in ("ring", "mesh2d"):
            for intra in ("local", "ring", "ulysses", "mesh2d"):
                name = f"hierarchical {size} {inter} {intra}"
                modules[name] = mosaic.HierarchicalAttention(size, inter, intra, causal=size < 4)
    errors = {}
    cutter = mosaic.ComposedAttention((1, p))
    for name, module in modules.items():
        for n in (8, 7):  # 7: uneven, known from what shard_qkv cut
            q, k, v = (torch.randn(2, h, n, 6, dtype=F64, requires_grad=True) for h in (4, 2, 2))
            options = {"is_causal": module.causal, "enable_gqa": True}
            want = F.scaled_dot_product_attention(q, k, v, **options)
            dout = torch.randn(want.shape, dtype=F64)
            out = module(*cutter.shard_qkv(q, k, v))
            out = cutter.gather_output(out, layout=Layout.even(n, p))
            got, grads = (gradients(y, [q, k, v], dout) for y in (out, want))
            errors[f"{name} {n}"] = difference([out, *got], [want, *grads])
    return errors


def joint() -> dict[str, float]:
    """Two mesh axes as one: a composition by mesh axes, and a grid of rows and cols."""
    mosaic.init(mesh_shape=(2, 2), mesh_axes=("rows", "cols"))
    torch.manual_seed(1)
    errors = {}
    for heads, sequence in (("rows", "cols"), ("cols", "rows")):
        composed = mosaic.Composed(mosaic.Ulysses(mesh=heads), mosaic.Ring(mesh=sequence))
        q, k, v = (torch.randn(2, 4, 8, 6, dtype=F64, requires_grad=True) for _ in range(3))
        want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        parts = [mosaic.shard_tensor(x, 2, mesh_axis="rows,cols") for x in (q, k, v)]
        out = mosaic.attention(*parts, composed, causal=True)
        out = mosaic.gather(out, 2, mesh_axis="rows,cols")
        dout = torch.randn(want.shape, dtype=F64)
        got, grads = (gradients(y, [q, k, v], dout) for y in (out, want))
        errors[str(composed)] = difference([out, *got], [want, *grads])
    module = mosaic.MultiAxisAttention2D(EMBED, HEADS, 1, 2, (2, 2), mesh="rows,cols").double()
    local = mosaic.MultiAxisAttention(EMBED, HEADS, 1).double()
    local.load_state_dict(module.state_dict())
    x = torch.randn(1, 4, 6, EMBED, dtype=F64)
    part = mosaic.shard_tensor(mosaic.shard_tensor(x, 1, mesh_axis="rows"), 2, mesh_axis="cols")
    out = mosaic.gather(mosaic.gather(module(part), 1, mesh_axis="rows"), 2, mesh_axis="cols")
    errors["two axes"] = difference([out], [local(x.flatten(1, 2)).unflatten(1, (4, 6))])
    return errors


# --- dropout, and layers beside the modules -------------------------------------------------------


def dropout(p: int) -> Tensor:
    """The whole output of a module in training: the same for every p and backend."""
    mosaic.init(sp_size=p)
    torch.manual_seed(4)
    module = mosaic.MultiAxisAttention(EMBED, HEADS, 1, "ring", dropout=0.4).double()
    x = torch.randn(2, 8, EMBED, dtype=F64)
    outs = []
    for method in methods(p)[1:]:
        module.method = mosaic.api.methods.method_of(method)
        torch.manual_seed(5)
        outs.append(mosaic.gather(module(mosaic.shard_tensor(x, 1)), 1))
    module.eval()
    first = mosaic.gather(module(mosaic.shard_tensor(x, 1)), 1)
    assert torch.equal(first, mosaic.gather(module(mosaic.shard_tensor(x, 1)), 1))
    return torch.stack([*outs, first]).detach()


class Block(nn.Module):
    """A table model: columns are local, rows are cut, and there are layers beside them."""

    def __init__(self, backend: Any):
        super().__init__()
        self.columns = mosaic.MultiAxisAttention(EMBED, HEADS, 2)
        self.rows = mosaic.MultiAxisAttention(EMBED, HEADS, 1, backend)
        self.norm, self.last = nn.LayerNorm(EMBED), nn.Linear(EMBED, EMBED)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        x = x + self.columns(self.norm(x))
        return self.last(x + self.rows(x, layout=layout))


def block(p: int, compiler: str | None = None, n: int = 8) -> dict[str, float]:
    """All gradients of a model with other layers, by ``sum_gradients``; compiled at two lengths."""
    mosaic.init(sp_size=p)
    torch.manual_seed(6)
    model = Block("ring").double()
    local = Block("local").double()
    local.load_state_dict(model.state_dict())
    mosaic.sum_gradients(model)
    inner = {"options": {"inner": "eager"}} if compiler == "mosaic" else {}
    run = torch.compile(model, backend=compiler, fullgraph=True, **inner) if compiler else model
    errors = {}
    for length in (n, n + 2 * p, n + 4 * p)[: 3 if compiler else 1]:
        x = torch.randn(2, length, 3, EMBED, dtype=F64)
        model.zero_grad()
        local.zero_grad()
        y = x.clone().requires_grad_()
        want = local(y)
        want.square().sum().backward()
        held = Layout.even(length, p)
        part = mine(x, 1, held, dist.get_rank()).clone().requires_grad_()
        out = run(part)
        out.square().sum().backward()
        got = [out, part.grad, *(q.grad for q in model.parameters())]
        rank = dist.get_rank()
        expected = [mine(want, 1, held, rank), mine(y.grad, 1, held, rank)]
        errors[str(length)] = difference(got, expected + [q.grad for q in local.parameters()])
    return errors


def masked(p: int) -> dict[str, float]:
    """Masks of a module: padding for each batch, and a row for each query and head."""
    context = mosaic.init(sp_size=p)
    torch.manual_seed(7)
    n, errors = 8, {}
    held = Layout.zigzag(n, p)
    x = torch.randn(2, n, 3, EMBED, dtype=F64)
    padding = torch.arange(n) < torch.tensor([5, 7])[:, None, None, None, None]
    rows = torch.randn(1, HEADS, n, n, dtype=F64)
    for backend, options in backends(p):
        module = mosaic.MultiAxisAttention(EMBED, HEADS, 1, backend, **options).double()
        local = mosaic.MultiAxisAttention(EMBED, HEADS, 1).double()
        local.load_state_dict(module.state_dict())
        for name, whole, part in (
            ("padding", padding, padding),
            ("rows", rows, mine(rows, 2, held, context.rank())),
        ):
            run = partial(module, mask=part, layout=held)
            errors[f"{backend} {name}"] = compared(
                module, Filled(local, mask=whole), [x], [1], [held], {}, run
            )
    return errors


class Filled(nn.Module):
    """A module with keyword arguments filled in."""

    def __init__(self, module: nn.Module, **options: Any):
        super().__init__()
        self.module, self.options = module, options

    def forward(self, *args: Tensor) -> Tensor:
        return self.module(*args, **self.options)


# --- compiled -------------------------------------------------------------------------------------


def compiled(p: int, compiler: str, names: list[str], **options: Any) -> dict[str, float]:
    """Each module as one graph: outputs and gradients are those of eager code."""
    mosaic.init(sp_size=p)
    torch.manual_seed(8)
    x = torch.randn(2, 4, 2, EMBED, dtype=F64)
    q = torch.randn(1, HEADS, 4, 3, dtype=F64)
    zigzag = mosaic.shard_tensor(torch.randn(2, 8, EMBED, dtype=F64), 1, layout=Layout.zigzag(8, p))
    kinds: dict[str, tuple[Callable[[], nn.Module], list[Tensor]]] = {
        "rows": (lambda: mosaic.MultiAxisAttention(EMBED, HEADS, 1, "ring", causal=True), [zigzag]),
        "heads": (lambda: mosaic.MultiAxisAttention(EMBED, HEADS, 1, "ulysses"), [x]),
        "two axes": (lambda: mosaic.MultiAxisAttention2D(EMBED, HEADS, 1, 2, (1, p)), [x]),
        "cross": (lambda: mosaic.CrossAxisAttention(EMBED, HEADS, 1, 1, "ring"), [x, x[:, :3]]),
        "composed": (lambda: mosaic.ComposedAttention((p, 1)), [q, q, q]),
        "dropout": (lambda: mosaic.MultiAxisAttention(EMBED, HEADS, 1, "ring", dropout=0.5), [x]),
        "nodes": (lambda: mosaic.HierarchicalAttention(p), [q, q, q]),
    }
    errors = {}
    for name in names:
        build, inputs = kinds[name]
        module = build().double()
        results = []
        torch._dynamo.reset()
        run = torch.compile(module, backend=compiler, fullgraph=True, **options)
        for fn in (module, run):
            leaves = [y.detach().clone().requires_grad_() for y in inputs]
            for leaf, given in zip(leaves, inputs, strict=True):
                leaf.__dict__.update(given.__dict__)  # how it is cut
            torch.manual_seed(9)
            out = fn(*leaves)
            grads = torch.autograd.grad(out.sin().sum(), [*leaves, *module.parameters()])
            results.append([out, *grads])
        errors[name] = difference(results[1], results[0])
    return errors


def messages(p: int) -> dict[str, str]:
    """What is said on rank 1 where ranks or programs do not fit."""
    context = mosaic.init(sp_size=p)
    rank = context.rank()
    attn = mosaic.MultiAxisAttention(EMBED, HEADS, 1, "ring")
    q = torch.randn(1, 2, 4, 3)

    def bare(x):
        return attn(x) + F.scaled_dot_product_attention(x, x, x)

    def with_sinks(x):
        scores = torch.cat([x @ x.mT, torch.zeros_like(x[..., :1])], -1)
        return attn(x) + scores.softmax(-1)[..., :-1] @ x

    def whole(x):
        return attn(x)

    spec = mosaic.ShardingSpec(inputs={"x": "batch rows features"}, axes={"rows": "ring"})
    even = Layout.even(8, p)
    calls: dict[str, Callable[[], Any]] = {
        "unequal": lambda: attn(torch.randn(2, 4 - rank, EMBED)),
        "part": lambda: attn(torch.randn(2, 3, EMBED), layout=even),
        "ranks": lambda: attn(torch.randn(2, 3, EMBED), layout=Layout.even(8, p + 1)),
        "twice": lambda: attn(torch.randn(2, 3, EMBED), layout=Layout.of(4, [[(0, 3)]] * p)),
        "local": lambda: mosaic.attention(q, q, q, "local", layout=even),
        "grid": lambda: mosaic.attention(q, q, q, mosaic.Mesh2D(2, 2)),
        "2d": lambda: mosaic.MultiAxisAttention2D(EMBED, HEADS, 1, 2, (2, 2))(
            torch.randn(1, 2, 2, EMBED)
        ),
        "composed": lambda: mosaic.ComposedAttention((2, 2))(q, q, q),
        "single": lambda: mosaic.attention(
            q[:, :, :1], q[:, :, :1], q[:, :, :1], "ring",
            mask=torch.zeros(1, 1, 1, p, requires_grad=True),
        ),
        "bare": lambda: torch.compile(bare, backend="mosaic", options={"inner": "eager"})(
            torch.randn(2, 4, EMBED)
        ),
        "sinks": lambda: torch.compile(with_sinks, backend="mosaic", options={"inner": "eager"})(
            torch.randn(2, 4, EMBED)
        ),
        "spec": lambda: torch.compile(
            whole, backend="mosaic", options={"inner": "eager", "spec": spec}
        )(torch.randn(2, 4, EMBED)),
    }  # fmt: skip
    return {name: said(call) for name, call in calls.items()}


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return str(getattr(error, "inner_exception", error))
    return "nothing"
