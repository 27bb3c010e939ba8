"""What planning and lowering cost for many ranks and many layers: linear in the layers, and the
same for any number of ranks. ``python tests/costs`` prints the table."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from costs.decoder import Decoder, explained
from sampling import FULL
from torch import fx

from mosaic.passes import infer_axes
from mosaic.report.show import listing


@pytest.mark.parametrize("method", [FULL("ring"), "all_gather"])
def test_programs_are_as_long_for_256_ranks_as_for_8(method):
    few, many = (explained(1, p, method).graphs for p in (8, 256))
    for kind in ("local", "forward", "backward"):
        assert len(many[kind].nodes) <= 1.5 * len(few[kind].nodes), kind


def test_two_layers_on_1024_ranks():
    start = time.process_time()  # other tests run beside it
    plan = explained(2, 1024)
    assert time.process_time() - start < 60  # it takes 5 to 8
    texts = [a for node in plan.graphs["local"].nodes for a in node.args if isinstance(a, str)]
    assert texts and max(map(len, texts)) < 500  # they say who holds what
    assert max(map(len, "\n".join(plan.diffs.values()).splitlines())) < 5000


@pytest.mark.full
def test_each_layer_is_searched_once_for_axes(monkeypatch):
    """Where the axis of the last attention begins is known from the first one's search."""
    probes = []
    probe = infer_axes.__globals__["probe"]
    monkeypatch.setitem(
        infer_axes.__globals__, "probe", lambda *args: probes.append(args) or probe(*args)
    )
    counts = []
    for layers in (1, 2, 4):
        probes.clear()
        explained(layers, 2, named=False)
        counts.append(len(probes))
    one, two, four = counts
    assert four - two == 2 * (two - one) > 0


@pytest.mark.full
def test_eighty_layers():
    """Beside what torch takes to trace it without us (77 s and 56 s once), as machines differ."""
    plain = seconds(compiled_without_us)
    assert seconds(lambda: explained(80, 8)) < 2 * plain
    assert seconds(lambda: explained(80, 8, named=False)) < 2 * plain


def compiled_without_us() -> None:
    torch._dynamo.reset()
    torch.compile(Decoder(80), backend="aot_eager")(torch.zeros(1, 512, dtype=torch.long))


def seconds(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def test_a_listing_follows_thousands_of_views():
    """Without recursion: a node's readers may be behind many views that have no line."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(3)
    node = graph.call_function(torch.ops.aten.sin.default, (x,))
    node.meta["val"] = torch.ones(3)
    for _ in range(3000):
        node = graph.call_function(torch.ops.aten.view.default, (node, [3]))
        node.meta["val"] = torch.ones(3)
    for _ in range(2):
        node = graph.call_function(torch.ops.aten.sin.default, (node,))
        node.meta["val"] = torch.ones(3)
    graph.output((node,))
    assert listing(graph, brief=True).splitlines()[-1] == "return [sin_default_2]"
