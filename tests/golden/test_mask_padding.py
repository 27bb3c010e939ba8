"""What ``mask_padding`` makes of a program for all lengths of a bucket: 11 of at most 16 rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mosaic
from mosaic.frontend.explain import listening
from mosaic.report.plan import Plan


@pytest.fixture
def one_rank() -> Iterator[None]:
    context = mosaic.init(sp_size=1)
    yield
    context.shutdown()
    torch._dynamo.reset()


def averaged(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    y = F.scaled_dot_product_attention(x, x, x)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return y.mean(dim=1), F.cross_entropy(y.flatten(0, 1), shifted.flatten())


def test_mask_padding(check, one_rank) -> None:
    spec = mosaic.ShardingSpec(
        inputs={"x": "_ rows _", "labels": "_ rows"}, axes={"rows": "auto"}, buckets=(16,)
    )
    found: list[Plan] = []
    with listening(found):
        called = torch.compile(averaged, backend="mosaic", options={"spec": spec, "inner": "eager"})
        called(torch.randn(2, 11, 8), torch.randint(8, (2, 11)))
    check(
        found[0].diffs["mask_padding"],
        """\
 # y = F.scaled_dot_product_attention(x, x, x)
-sdpa: f32[2, 16, 8] = sdpa(x, x, x)
+arange_1: i64[16] = arange(16)
+lt_1: b8[16] = lt(arange_1, length)
+view_4: b8[1, 16, 1] = view(lt_1)
+expand: b8[2, 16, 1] = expand(view_4)
+reshape: b8[32] = reshape(expand)
+arange: i64[16] = arange(16)
+lt: b8[16] = lt(arange, length)
+view_1: b8[1, 1, 16] = view(lt)
+sdpa: f32[2, 16, 8] = sdpa(x, x, x, view_1)
 # shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
-pad: i64[2, 17] = pad(labels, [0, 1], value=-100)
+view_2: b8[1, 16] = view(lt)
+where: i64[2, 16] = where(view_2, labels, -100)
+pad: i64[2, 17] = pad(where, [0, 1], value=-100)
 slice_1: i64[2, 16] = pad[:, 1:]
 # return y.mean(dim=1), F.cross_entropy(y.flatten(0, 1), shifted.flatten())
-mean: f32[2, 8] = mean(sdpa, [1])
+view_3: b8[1, 16, 1] = view(lt)
+where_1: f32[2, 16, 8] = where(view_3, sdpa, 0)
+sum_1: f32[2, 8] = sum(where_1, [1])
+mul: i64[] = mul(length, 1)
+div: f32[2, 8] = div(sum_1, mul)
 view: f32[32, 8] = view(sdpa)
...
 _unsafe_view: i64[32] = _unsafe_view(clone)
-cross_entropy_loss: f32[] = cross_entropy_loss(view, _unsafe_view)
-return [mean, cross_entropy_loss]
+where_2: i64[32] = where(reshape, _unsafe_view, -100)
+cross_entropy_loss: f32[] = cross_entropy_loss(view, where_2)
+return [div, cross_entropy_loss]
""",
    )
    assert "one program for lengths 2 to 16 of axis 'rows'" in found[0].notes
