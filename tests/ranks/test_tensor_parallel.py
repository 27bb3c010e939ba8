"""Tensor parallelism over a mesh axis beside the one that cuts the sequence: gradients are those of
one process. What is not followed is refused by name."""

from __future__ import annotations

import pytest
import tensor_parallel_jobs as jobs
from compare import assert_close, compare_gradients
from expecttest import assert_expected_inline
from sampling import FULL

#: What is said of a table that is cut over its words, as a row-parallel embedding is.
TABLE = "aten.embedding needs its 'v' whole"


@pytest.mark.parametrize(
    "sp, tp, how, plan, n, said",
    [
        (2, 2, "compile", "blocks", 13, []),
        FULL(2, 2, "fsdp", "embedding, head", 13, [TABLE]),
        FULL(1, 2, "compile", "blocks", 13, []),
        FULL(2, 2, "compile", "embedding, head", 13, [TABLE]),
        FULL(2, 2, "parallelize", "blocks", 13, []),
        FULL(2, 2, "parallelize", "embedding, head", 13, [TABLE]),
        FULL(2, 2, "checkpoint", "blocks", 13, []),
        FULL(2, 2, "compile", "sequence", 12, [TABLE, "slice_to has an operand that is cut"]),
    ],
)
def test_two_steps(ranks, sp: int, tp: int, how: str, plan: str, n: int, said: list[str]) -> None:
    want = jobs.trained(0, 0, n=n)
    for got in ranks(sp * tp).run(jobs.trained, sp, tp, how, plan, n=n):
        for mine, theirs in zip(got["losses"], want["losses"], strict=True):
            assert_close("loss", mine, theirs, 1e-12)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)
        assert all(any(line.startswith(text) for text in said) for line in got["gathered"])
        assert got["parts"] == sum(name in jobs.CUT[plan] for name in want["gradients"])


def test_parameters_that_are_gathered_in_the_graph(ranks) -> None:
    """As SimpleFSDP has them, over replicas: each has a batch, and gradients are averaged."""
    want = jobs.gathered(2, 0)
    every = ranks(4).run(jobs.gathered, 2, 2)
    assert_close("loss", sum(got["loss"] for got in every) / 2, want["loss"], 1e-12)
    for got in every:
        compare_gradients(want["gradients"], got["gradients"], 1e-10)


def test_refused(ranks) -> None:
    said = ranks(4).run(jobs.refused)[0]
    assert_expected_inline(
        "\n\n".join(said.values()),
        """\
UnsupportedError: layer.weight is a DTensor, and its mesh is no axis of mosaic.init
  tests/ranks/tensor_parallel_jobs.py in forward
    return self.layer(x) * 2
  fix  say which mesh axis it is over: mosaic.init(mesh_shape=(2, 2), mesh_axes=('sp', 'tp')), and parallelize_module(model, ranks.mesh['tp'], plan)

UnsupportedError: scale is a DTensor, and it is over 2 mesh axes, where one is followed
  tests/ranks/tensor_parallel_jobs.py in forward
    return x * self.scale.to_local().sum()
  fix  let fully_shard gather it over all of them but one, before the forward

UnsupportedError: layer.weight is a DTensor, and Mosaic cuts activations over its mesh axis 'sp'
  tests/ranks/tensor_parallel_jobs.py in forward
    return self.layer(x) * 2
  fix  distribute it over another axis, as 'tp' or 'dp'; mosaic.parallelize(..., fully_shard=True) shards parameters over this one

UnsupportedError: layer.weight is a DTensor, and dim 0 of its sizes [5, 16] has no 2 equal parts
  tests/ranks/tensor_parallel_jobs.py in forward
    return self.layer(x) * 2
  fix  make the size (heads, features) a multiple of the ranks, or leave this layer whole

UnsupportedError: the program gives a DTensor (mul)
  tests/ranks/tensor_parallel_jobs.py in forward
    return self.layer(x) * 2
  fix  give a plain tensor: x.to_local(), or use_local_output=True in the style of the layer that makes it; and let no graph break come between

UnsupportedError: DTensor.to_local gives one rank's part of a sum
  tests/ranks/tensor_parallel_jobs.py in forward
    return self.layer(x) * 2
  reason  sums of tensor parallelism meet at once in what Mosaic writes
  fix     redistribute it first: x.redistribute(placements=[Replicate()]) (RowwiseParallel() does)""",  # noqa: E501
    )
