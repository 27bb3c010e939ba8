"""What ``localize_dtensors`` does to a block whose products are cut over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import mosaic
from mosaic.torch_private import FakeStore


@pytest.fixture
def ranks() -> Iterator[mosaic.MosaicContext]:
    """Rank 1 of 2 x 2."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    context = mosaic.init(mesh_shape=(2, 2), mesh_axes=("sp", "tp"))
    yield context
    context.shutdown()
    dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x)
        return self.down(self.up(y).relu())


def test_localize_dtensors(ranks, check):
    styles = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(Block().double(), ranks.mesh["tp"], styles)
    x = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    plan = mosaic.explain(model, x)
    text = plan.diffs["localize_dtensors"]
    check(
        text[text.index("-up_weight") :],
        """\
-up_weight: f64[6, 8]
-up_bias: f64[6]
-down_weight: f64[8, 6]
+up_weight: f64[3, 8]
+up_bias: f64[3]
+down_weight: f64[8, 3]
 down_bias: f64[8]
...
 sdpa: f64[2, 11, 8] = sdpa(x, x, x)
-from_rank: f64[2, 11, 8] = mosaic.from_rank(sdpa, -1, 'tp', 2)
+sdpa_1_entered: f64[2, 11, 8] = enter(sdpa, tp)
 # return self.down(self.up(y).relu())
-linear: f64[2, 11, 6] = linear(from_rank, up_weight, up_bias)
-redistribute: f64[2, 11, 6] = mosaic.redistribute(linear, 2, 'tp', 2)
-to_rank: f64[2, 11, 3] = mosaic.to_rank(redistribute, 2, '', 'tp', 2)
-relu: f64[2, 11, 3] = relu(to_rank)
-from_rank_1: f64[2, 11, 6] = mosaic.from_rank(relu, 2, 'tp', 2)
-linear_1: f64[2, 11, 8] = linear(from_rank_1, down_weight, down_bias)
-redistribute_1: f64[2, 11, 8] = mosaic.redistribute(linear_1, -1, 'tp', 2)
-to_rank_1: f64[2, 11, 8] = mosaic.to_rank(redistribute_1, -1, '', 'tp', 2)
-return [to_rank_1]
+linear: f64[2, 11, 3] = linear(sdpa_1_entered, up_weight, up_bias)
+relu: f64[2, 11, 3] = relu(linear)
+linear_1: f64[2, 11, 8] = linear(relu, down_weight)
+sum_across: f64[2, 11, 8] = sum_across(linear_1, tp, 'sum')
+linear_2: f64[2, 11, 8] = add(sum_across, down_bias)
+return [linear_2]
""",
    )
