"""Equal regions of a graph become calls of one subgraph: the program stays what it was."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner

from mosaic.graph import regions
from mosaic.graph.regions import REGION, repeats_once
from mosaic.torch_private import FakeTensorMode

aten = torch.ops.aten


class Program:
    """A graph that is written node by node, and its tensors."""

    def __init__(self, *inputs: Tensor) -> None:
        self.graph, self.inputs = fx.Graph(), inputs
        self.given = [self.graph.placeholder(f"x{i}") for i in range(len(inputs))]
        for node, x in zip(self.given, inputs, strict=True):
            node.meta["val"] = x

    def __call__(self, target, *args, region: str = "") -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"].clone()))
        node.meta.update({REGION: region} if region else {})
        return node

    def module(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        return fx.GraphModule({}, self.graph)


def attention(program: Program, q: fx.Node, k: fx.Node, name: str, factor: float = 2) -> fx.Node:
    scores = program(aten.mm.default, q, k, region=name)
    scaled = program(aten.mul.Tensor, scores, factor, region=name)
    return program(aten.relu.default, scaled, region=name)


@pytest.fixture(autouse=True)
def small_regions(monkeypatch):
    monkeypatch.setattr(regions, "LEAST", 2)


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return Program(*(torch.randn(3, 3) for _ in range(2)))


def same(module: fx.GraphModule, program: Program) -> fx.GraphModule:
    """What ``repeats_once`` makes of it, which gives the same."""
    shared = repeats_once(module)
    apart, together = (m(*(x.clone() for x in program.inputs)) for m in (module, shared))
    for x, y in zip(apart, together, strict=True):
        assert torch.equal(x, y)
    return shared


def code(module: fx.GraphModule) -> str:
    lines = (f"{n.name} = {n.target}{n.args}" for n in module.graph.nodes if n.op != "placeholder")
    return "\n".join(lines)


def test_two_layers_have_one_subgraph(program):
    q, k = program.given
    first = attention(program, q, k, "a")
    middle = program(aten.sin.default, first)
    second = attention(program, middle, k, "b")
    shared = same(program.module(second), program)
    assert_expected_inline(
        code(shared),
        """\
region_0 = region_0()
invoke_subgraph = invoke_subgraph(region_0, 'region_0', x0, x1)
getitem = <built-in function getitem>(invoke_subgraph, 0)
sin_default = aten.sin.default(getitem,)
region_1 = region_0()
invoke_subgraph_1 = invoke_subgraph(region_1, 'region_0', sin_default, x1)
getitem_1 = <built-in function getitem>(invoke_subgraph_1, 0)
output = output((getitem_1,),)""",
    )


def test_inductor_compiles_a_subgraph(program):
    q, k = program.given
    second = attention(program, attention(program, q, k, "a"), k, "b")
    module = program.module(second)
    (want,) = module(*program.inputs)
    mode = FakeTensorMode()
    for node in module.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = mode.from_tensor(node.meta["val"])
    examples = [node.meta["val"] for node in program.given]
    with tracing(TracingContext(mode)):
        compiled = compile_fx_inner(repeats_once(module), examples)
    (found,) = compiled([*program.inputs])
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("why", ["another number", "one only"])
def test_what_is_not_equal_stays(program, why):
    q, k = program.given
    first = attention(program, q, k, "a")
    second = attention(program, first, k, "" if why == "one only" else "b", 3)
    module = program.module(first, second)
    assert same(module, program) is module


def test_what_gives_a_view_of_an_operand_stays(program):
    """A compiled call may write into what it is given last."""
    views = []
    for name in "ab":
        turned = program(aten.t.default, program.given[1], region=name)
        views.append(program(aten.t.default, turned, region=name))
    module = program.module(*views)
    assert same(module, program) is module


def test_a_region_between_which_others_compute_is_moved_together(program):
    """As starts and waits of collectives are."""
    q, k = program.given
    first = program(aten.mm.default, q, k, region="a")
    between = program(aten.cos.default, k)
    first = program(aten.mul.Tensor, first, between, region="a")
    second = program(aten.mm.default, first, k, region="b")
    between = program(aten.sin.default, k)
    second = program(aten.mul.Tensor, second, between, region="b")
    shared = same(program.module(second), program)
    assert [n.name for n in shared.graph.nodes if "invoke" in n.name] == [
        "invoke_subgraph",
        "invoke_subgraph_1",
    ]


def test_regions_that_need_what_needs_them_stay(program):
    """Neither can be called before the other."""
    q, k = program.given
    halves = {name: program(aten.mm.default, q, k, region=name) for name in "ab"}
    for name, other in ("ab", "ba"):
        program(aten.mul.Tensor, halves[other], 2, region=name)
    ends = [n for n in program.graph.nodes if n.target is aten.mul.Tensor]
    module = program.module(*ends)
    assert same(module, program) is module


def test_a_write_stays_behind_what_was_read_before(program):
    q, k = program.given
    first = attention(program, q, k, "a")
    old = program(aten.sin.default, k)
    second = attention(program, first, k, "b")
    written = program(aten.copy_.default, k, first)
    new = program(aten.mul.Tensor, written, 2)
    same(program.module(second, old, new), program)
