"""What Mosaic decides about the example models on 4 ranks: a new collective shows here."""

from __future__ import annotations

import gc
import time
from types import SimpleNamespace

import cases
import contract_cases as cc
import pytest
import torch
import torch.nn.functional as F
from models.gpt import GPT
from plan_text import collectives
from torch import fx

from mosaic import ShardingSpec
from mosaic.graph import pipeline
from mosaic.report.plan import Plan
from mosaic.report.show import inputs_of, path_of


def decided(plan: Plan) -> str:
    """Axis, layout, each attention without its line, and the other collectives."""
    rows = [f"{plan.axis} {plan.layout}"]
    rows += [
        f"{a.axis or 'other dim'} {a.queries} x {a.keys} {a.method} {a.mask or 'full'} {a.bytes} B"
        for a in plan.attentions
    ]
    return "\n".join([*rows, collectives(plan)])


def test_table(planned, check):
    model, args, _ = cases.table()
    check(
        decided(planned(model, *args)),
        """\
x.1 37=0:10|10:20|20:30|30:37
other dim 6 x 6 local full 0 B
x.1 26 x 26 all_gather full 179712 B
x.1 11 x 26 all_gather full 179712 B
other dim 6 x 6 local full 0 B
x.1 26 x 26 all_gather full 179712 B
x.1 11 x 26 all_gather full 179712 B
3 x all_reduce x.1 180 B: sum over the axis
1 x all_reduce x.1 180 B: largest over the axis
1 x all_gather x.1 396 B: an output is whole
1 x all_reduce x.1 336948 B: gradients of whole tensors, in backward
""",
    )


def test_gpt(planned, check):
    model, args, _ = cases.gpt()
    check(
        decided(planned(model, *args)),
        """\
ids.1 37=0:5,35:37|5:10,30:35|10:15,25:30|15:25
ids.1 37 x 37 all_gather causal 31968 B
ids.1 37 x 37 all_gather causal 31968 B
1 x all_reduce ids.1 12 B: sum of the losses
1 x all_reduce ids.1 12 B: sum over the axis
1 x all_gather ids.1 15318 B: an output is whole
1 x all_reduce ids.1 199008 B: gradients of whole tensors, in backward
""",
    )


def test_llama(planned, check):
    model, args, _ = cases.llama()
    check(
        decided(planned(model, *args)),
        """\
ids.1 37=0:5,35:37|5:10,30:35|10:15,25:30|15:25
ids.1 37 x 37 all_gather causal 7104 B
ids.1 37 x 37 all_gather causal 7104 B
1 x all_reduce ids.1 12 B: sum of the losses
1 x all_reduce ids.1 12 B: sum over the axis
1 x all_gather ids.1 21534 B: an output is whole
1 x all_reduce ids.1 260736 B: gradients of whole tensors, in backward
""",
    )


def test_vit(planned, check):
    model, args, _ = cases.vit()
    check(
        decided(planned(model, *args)),
        """\
dim 2 of view 16=0:4|4:8|8:12|12:16
dim 2 of view 17 x 17 all_gather full 19584 B
dim 2 of view 17 x 17 all_gather full 19584 B
1 x slice dim 2 of view 9216 B: gradient of a whole value that is used in parts
1 x slice dim 2 of view 192 B: gradient of a whole value that is used in parts
1 x slice dim 2 of view 3264 B: gradient of a whole value that is used in parts
1 x all_reduce dim 2 of view 1152 B: sum over the axis
1 x all_reduce dim 2 of view 305664 B: gradients of whole tensors, in backward
""",
    )


def test_integers_that_every_rank_has_are_not_gathered(planned):
    """transformers finds a packed row's documents by a diff and a cumsum along the axis."""
    model, args, inputs = cases.hf_llama_packed(1)
    plan = planned(model, *args, spec=ShardingSpec(on_gather="error"), **inputs)
    assert [a.mask for a in plan.attentions] == ["causal, documents"] * 2
    assert not plan.gathered
    sent = [c for c in plan.collectives if c.op != "all_reduce"]
    assert [c.why for c in sent] == ["an output is whole"]


@pytest.mark.parametrize("trained", [True, False])
def test_constants_are_no_inputs(planned, contexts, trained: bool):
    class Shifted(cc.Attention):
        def forward(self, x):
            return super().forward(x + torch.tensor(2.0))

    with torch.set_grad_enabled(trained):
        plan = planned(Shifted(), torch.randn(2, 13, cc.E))
    inputs = inputs_of(plan.graphs["forward"], contexts[0])
    names = ["x", "qkv.weight", "qkv.bias", "out.weight", "out.bias"]
    assert [path_of(given) for given in inputs.values()] == names
    assert plan.graphs["forward"].find_nodes(op="placeholder")[1:] == list(inputs)


def test_passes_are_fast(planned, monkeypatch: pytest.MonkeyPatch):
    """6 layers: the graph of a real GPT, at sizes that cost nothing. Beside what torch does to
    compile it, and in CPU time: machines differ, and others may be using this one."""
    monkeypatch.setattr(pipeline, "time", SimpleNamespace(perf_counter=time.process_time))
    model = GPT(vocab=23, context=64, embed=48, heads=12, layers=6)
    ids = torch.randint(0, 23, (2, 64))
    start = time.process_time()
    plan = planned(model, ids, ids)
    assert len(plan.attentions) == 6
    whole = time.process_time() - start
    assert plan.seconds < 0.3 * whole, "\n".join(map(str, plan.passes))


def test_nothing_is_kept_of_a_compilation(planned):
    """A service that meets length after length must not grow: no graph outlives its plan."""

    def attend(x):
        return F.scaled_dot_product_attention(x, x.sin(), x, is_causal=True).sum()

    def kept(length: int) -> int:
        planned(attend, torch.randn(1, 2, length, 8, requires_grad=True))
        torch._dynamo.reset()
        gc.collect()
        return sum(type(o) is fx.Node for o in gc.get_objects())

    kept(5)
    once = kept(5)  # torch itself holds on to the last one
    assert kept(6) and kept(7) and kept(5) <= once
