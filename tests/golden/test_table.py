"""The pipeline on a table block: attention over columns stays, over rows it gathers keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

import cases
import pytest
import torch
from sampling import FULL
from torch import Tensor, fx, nn

from mosaic.api.methods import Auto
from mosaic.attention import resolve
from mosaic.layout import Layout
from mosaic.partition.context import Context
from mosaic.report.plan import Plan
from mosaic.report.show import listing

RANKS = range(4)


class Block(nn.Module):
    """As examples/models/table.py, without norms, biases and MLP."""

    def __init__(self, embed: int):
        super().__init__()
        self.between_columns = nn.MultiheadAttention(embed, 1, bias=False, batch_first=True)
        self.between_rows = nn.MultiheadAttention(embed, 1, bias=False, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns, embed = x.shape
        x = x.reshape(batch * rows, columns, embed)
        x = x + self.between_columns(x, x, x)[0]
        x = x.reshape(batch, rows, columns, embed).transpose(1, 2).flatten(0, 1)
        return x + self.between_rows(x, x, x)[0]


def block() -> tuple[nn.Module, Tensor]:
    return Block(8).double(), torch.randn(2, 11, 3, 8).double()


def collectives(graph: fx.Graph) -> list[tuple[str, object]]:
    """(op, group) of every collective that is started, in order."""
    started = [n for n in graph.nodes if str(n.target).startswith("_c10d_functional")]
    return [(str(n.target), n.args[-1]) for n in started if "wait_tensor" not in str(n.target)]


def shapes(plan: Plan) -> Iterator[tuple[str, list[int]]]:
    """Every tensor of the lowered graphs."""
    for kind in ("forward", "backward"):
        for node in plan.graphs[kind].nodes:
            if isinstance(node.meta.get("val"), Tensor):
                yield f"{kind} {node.name}", list(node.meta["val"].shape)


def test_forward(planned, contexts: list[Context], check):
    plan = planned(*block())
    check(
        listing(plan.graphs["forward"], contexts[0], fold_waits=True, brief=True),
        """\
x: f64[2, 11, 3, 8]
# x = x + self.between_columns(x, x, x)[0]
mm: f64[18, 24] = mm(x[:, 3:6], between_columns.in_proj_weight)
mul: f64[6, 3, 8] = mul(mm[0], 0.3536)
flash: (f64[6, 1, 3, 8], f64[6, 1, 3]) = flash(mul, mm[1], mm[2], scale=1)
mm_1: f64[18, 8] = mm(flash[0], between_columns.out_proj.weight)
add: f64[6, 3, 8] = add(x[:, 3:6], mm_1)
# return x + self.between_rows(x, x, x)[0]
mm_2: f64[18, 24] = mm(add, between_rows.in_proj_weight)
mul_1: f64[6, 3, 8] = mul(mm_2[0], 0.3536)
cat: f64[3, 96] = cat([mm_2[1], mm_2[2]], 1)
all_gather_1: f64[12, 96] = all_gather(cat, 4, sp)
flash_1: (f64[6, 1, 3, 8], f64[6, 1, 3]) = flash(mul_1, all_gather_1[:, :48][:, :, :11],
    all_gather_1[:, 48:96][:, :, :11], scale=1)
mm_3: f64[18, 8] = mm(flash_1[0], between_rows.out_proj.weight)
add_1: f64[6, 3, 8] = add(add, mm_3)
all_gather: f64[12, 6, 1, 1, 8] = all_gather(add_1, 4, sp)
return [all_gather[:11], x[:, 3:6], mul, mm[1], mm[2], flash[1], flash[0], add, mul_1, mm_2[1],
    mm_2[2], flash_1[0], between_rows.out_proj.weight, flash_1[0], flash_1[1],
    between_rows.in_proj_weight, between_columns.out_proj.weight, flash[0]]
""",
    )


def test_columns_are_untouched(planned):
    columns, rows = planned(*block()).attentions
    assert (columns.method, columns.axis, columns.bytes) == ("local", "", 0)
    assert (rows.method, rows.axis, rows.queries, rows.keys) == ("all_gather", "x.1", 11, 11)


def test_ranks_issue_the_same_collectives(planned):
    plans = [planned(*block(), rank=r) for r in RANKS]
    for kind in ("forward", "backward"):
        first, *others = (collectives(plan.graphs[kind]) for plan in plans)
        assert first and all(other == first for other in others)


BUILT = [
    cases.table,
    *map(FULL, (cases.gpt, cases.llama, cases.vit, cases.hf_bert, cases.hf_t5_encoder)),
    *map(FULL, (cases.hf_llama, cases.hf_llama_packed, cases.hf_mistral)),
]


@pytest.mark.parametrize("build", BUILT)
def test_no_tensor_is_quadratic(planned, monkeypatch, build: Callable[[], cases.Built]):
    """Nor has one a row of all keys for each of this rank's queries, as a dense mask has. (With a
    ring of p stages: gathered keys are as long as the axis, and so is a row of their scores.)"""
    monkeypatch.setitem(resolve.RESOLVE, Auto, lambda _, x, at: (resolve.ring(x, at, x.p), ""))
    model, args, kwargs = build()
    plan = planned(model, *args, **kwargs)
    along = [a for a in plan.attentions if a.axis]
    lengths = {n for a in along for n in (a.queries, a.keys)}
    assert along
    local = Layout.parse(plan.layout).lengths[1]
    for name, shape in shapes(plan):
        pairs = [set(pair) for pair in combinations(shape, 2)]
        quadratic = [pair for pair in pairs if pair <= {local, *lengths} and pair & lengths]
        assert not quadratic, f"{name} has shape {shape}"
