"""What ranks do in the tests of the rules: cut a sample every way, and compare with eager."""

from __future__ import annotations

import traceback
import zlib
from collections import Counter
from functools import cache
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from rule_case import Case, Cut
from rule_cases import CASES
from rule_costs import COSTS
from torch import Tensor, fx

import mosaic
import mosaic.attention.op
import mosaic.runtime.collectives
from mosaic.api.errors import UnsupportedError
from mosaic.api.spec import ShardingSpec
from mosaic.frontend.capture import Captured, capture
from mosaic.graph.modes import Modes
from mosaic.graph.ops import key
from mosaic.graph.real_strides import heeding_strides
from mosaic.layout import Layout
from mosaic.partition.context import Context, Output
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.table import RULES
from mosaic.partition.values import Axis, Call
from mosaic.passes.analyze_masks import analyze_masks
from mosaic.passes.lower_attention import lower_attention
from mosaic.passes.lower_collectives import lower_collectives
from mosaic.passes.normalize import normalize
from mosaic.passes.partition import partition
from mosaic.passes.pin_collectives import pin_collectives
from mosaic.passes.raise_attention import raise_attention
from mosaic.passes.rewrite_attention import rewrite_attention
from mosaic.runtime.mesh import current_context
from mosaic.runtime.world import World
from mosaic.torch_private import compile_by_eager, pytree

LAYOUTS = {"even": Layout.even, "zigzag": Layout.zigzag}
P = 3


# --- the program --------------------------------------------------------------------------------


class Program(torch.nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.case = case

    def forward(self, *args: Tensor) -> Any:
        return self.case.run(*args)


@cache  # ranks that are forked later inherit what was captured
def captured(name: str) -> Captured:
    """The sample as the backend would see it, without Dynamo: one call of the function."""
    case = CASES[name]
    graph, root = fx.Graph(), torch.nn.Module()
    root.program = Program(case)
    nodes = [graph.placeholder(f"arg{i}") for i in range(len(case.inputs))]
    for node, tensor in zip(nodes, case.tensors(), strict=True):
        node.meta["example_value"] = tensor
    graph.output((graph.call_module("program", tuple(nodes)),))
    found = capture(fx.GraphModule(root, graph))
    context = Context(ShardingSpec(), World(1, 0, ""), found.inputs, found.mutated, Modes.current())
    normalize(found.graph, context)
    raise_attention(found.graph, context)
    analyze_masks(found.graph, context)
    return found


def copied(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new


def axis_of(case: Case, cut: Cut, layout: str, p: int, graph: fx.Graph) -> Axis:
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    size = case.inputs[cut[0][0]].shape[cut[0][1]]
    seeds = tuple((names[arg], dim) for arg, dim in cut)
    return Axis("axis", "sp", LAYOUTS[layout](size, p), mosaic.Ring(), seeds)


def local_program(case: Case, cut: Cut, layout: str, world: World) -> Any:
    program = captured(case.name)
    graph = copied(program.graph)
    context = Context(ShardingSpec(), world, program.inputs, program.mutated, Modes.current())
    context.axes = (axis_of(case, cut, layout, world.size, graph),)
    context.outputs = (Output(),) * len(graph.output_node().args[0])  # as normalize says
    partition(graph, context)
    rewrite_attention(graph, context)
    local = fx.GraphModule(program.root, graph)
    # AOTAutograd where inputs are written to; elsewhere the local program as it is: that is faster.
    return compiled(local, case) if program.mutated else local


def compiled(local: fx.GraphModule, case: Case) -> Any:
    def lower(graph: fx.Graph, kind: str) -> None:
        if kind == "joint":
            pin_collectives(graph, None)
            return
        lower_collectives(graph, None)
        lower_attention(graph, None)

    return compile_by_eager(local, case.tensors(), lower, heeding_strides)


def costs(case: Case) -> str:
    """A word for each input, a letter for each of its dims."""
    words = [["_"] if not given.shape else [] for given in case.inputs]
    for cut in case.single_cuts():
        words[cut[0][0]].append(cost_of(case, cut))
    return " ".join("".join(word) for word in words)


def costs_of_my_share() -> tuple[dict[str, str], set[str]]:
    """The costs of every p-th sample, and which rows of the table it met."""
    mine = list(CASES.items())[dist.get_rank() :: dist.get_world_size()]
    return {name: costs(case) for name, case in mine}, MET


def cost_of(case: Case, cut: Cut, layout: str = "even") -> str:
    """What the planner says this cut sends in forward, as a letter of ``rule_costs``."""
    graph = captured(case.name).graph
    planner = Recorder(axis_of(case, cut, layout, P, graph), RULES)
    try:
        planner.run(list(graph.nodes))
    except UnsupportedError:
        return "x"
    sent = Counter(c.op for c in planner.collectives)
    if planner.gathered:
        return "G"
    if sent["all_gather"]:
        return "w"
    if sent["all_to_all"]:
        return ">"
    return str(sent["all_reduce"]) if sent["all_reduce"] else "."


# --- running it ---------------------------------------------------------------------------------


def outcome(program: Any, case: Case) -> dict[str, Tensor]:
    """Outputs, the gradients of a fixed projection of them, and the inputs as they were left."""
    tensors = case.tensors()
    torch.manual_seed(7)
    outs = [x for x in pytree.tree_leaves(program(*tensors)) if isinstance(x, Tensor)]
    found = {f"output {i}": x.detach() for i, x in enumerate(outs)}
    generator = torch.Generator().manual_seed(1)
    terms = []
    for x in outs:
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if x.requires_grad:
            terms.append((x.double() * weight).sum())
    wanted = [(i, t) for i, t in enumerate(tensors) if t.requires_grad]
    if terms:
        grads = torch.autograd.grad(sum(terms), [t for _, t in wanted], allow_unused=True)
        for (i, t), grad in zip(wanted, grads, strict=True):
            found[f"gradient {i}"] = torch.zeros_like(t) if grad is None else grad
    found.update({f"input {i}": t.detach() for i, t in enumerate(tensors)})
    return found


def differences(want: dict[str, Tensor], got: dict[str, Tensor], tol: float) -> list[str]:
    wrong = [f"{sorted(want)} != {sorted(got)}"] if want.keys() != got.keys() else []
    for name in want.keys() & got.keys():
        try:
            scale = (
                max(1.0, want[name].double().nan_to_num(0, 0, 0).abs().max().item())
                if want[name].numel()
                else 1.0
            )
            torch.testing.assert_close(
                got[name], want[name], rtol=tol, atol=tol * scale, equal_nan=True
            )
        except AssertionError as error:
            wrong.append(
                f"{name}: {str(error).splitlines()[0]} {want[name].flatten()[:6].tolist()}"
                f" got {got[name].flatten()[:6].tolist()}"
            )
    return wrong


def world_of(p: int) -> World:
    if p == 1:
        return World(1, 0, "")
    mosaic.init(sp_size=p)
    context = current_context()
    assert context is not None
    return World(p, context.rank("sp"), context.group_name("sp"))


def agreed(failed: bool) -> bool:
    """Whether any rank failed before anything was sent."""
    flag = torch.tensor([int(failed)])
    dist.all_reduce(flag)
    return bool(flag.item())


def check_cut(
    case: Case, cut: Cut, layout: str, world: World, want: dict[str, Tensor]
) -> list[str]:
    program, wrong = None, []
    try:
        program = local_program(case, cut, layout, world)
    except UnsupportedError as error:
        wrong = [] if cost_of(case, cut) == "x" else [str(error)]
    except Exception:
        wrong = [traceback.format_exc(limit=-4)]
    if agreed(bool(wrong)) or program is None:
        return wrong
    try:
        got = outcome(program, case)
    except Exception as error:
        error.add_note(
            f"{case.name}, cut {cut}, {layout}, rank {world.rank}\n{getattr(program, 'graph', '')}"
        )
        raise
    return differences(want, got, case.tol)


def runs(case: Case, full: bool) -> list[tuple[Cut, str]]:
    """Which cuts in which layouts; not in full, single cuts in one layout each, by turns, and of
    those that fall back to a gather one."""
    if full:
        return [(cut, layout) for cut in case.cuts() for layout in LAYOUTS]
    turns = cycle(LAYOUTS) if zlib.crc32(case.name.encode()) % 2 else cycle(reversed(LAYOUTS))
    letters = COSTS.get(case.name, "." * 99).replace(" ", "").replace("_", "")
    chosen = [
        cut
        for index, cut in enumerate(case.single_cuts())
        if letters[index] != "G" or "G" not in letters[:index]
    ]
    return list(zip(chosen, turns, strict=False))


def check(names: list[str], full: bool) -> list[str]:
    """These cases on this rank; what is wrong, in words."""
    world = world_of(dist.get_world_size())
    wrong: list[str] = []
    for name in names:
        case = CASES[name]
        reference = (
            local_program(case, case.cuts()[0], "even", World(1, 0, ""))
            if case.random
            else case.run
        )
        want = outcome(reference, case)
        for cut, layout in runs(case, full):
            found = check_cut(case, cut, layout, world, want)
            wrong += [f"{name} cut {cut} {layout} rank {world.rank}: {line}" for line in found]
    return wrong


def drawn(name: str, cut: Cut, p: int) -> dict[str, Tensor]:
    """What a random program gives on p ranks."""
    return outcome(local_program(CASES[name], cut, "even", world_of(p)), CASES[name])


class Recorder(ShardingInterpreter):
    """Plans, and notes which ops were met with a sharded operand."""

    def apply(self, call: Call) -> Any:
        MET.add(key(call.target))
        return super().apply(call)


MET: set[str] = set()
