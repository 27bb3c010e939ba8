"""A graph that is run node by node: what comes need not lie in memory as it was traced."""

from __future__ import annotations

import pytest
import torch

from mosaic.graph import real_strides

c10d = torch.ops._c10d_functional


@pytest.mark.parametrize(
    "collective",
    [
        c10d.all_gather_into_tensor.default,
        c10d.all_to_all_single.default,
        c10d.reduce_scatter_tensor.default,
    ],
)
def test_a_collective_gets_its_input_in_order(collective, monkeypatch) -> None:
    """NCCL refuses what is transposed, on the ranks where it is, and the others hang."""
    graph = torch.fx.Graph()
    graph.output(graph.call_function(collective, (graph.placeholder("x"), "group")))
    given = []
    heeding = real_strides.HEEDFUL[collective]
    monkeypatch.setattr(heeding.__closure__[0], "cell_contents", lambda x, *_: given.append(x))
    torch.fx.GraphModule({}, real_strides.heeding_strides(graph))(torch.ones(2, 3).mT)
    assert given[0].shape == (3, 2) and given[0].is_contiguous()
