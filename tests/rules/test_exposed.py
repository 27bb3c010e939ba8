"""Of kernels' intervals: how long something is sent while nothing computes, and what."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from exposed import Kernel, exposure, joined, kernels_of, length, sends, without
from hypothesis import given
from hypothesis import strategies as st

SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)).map(lambda x: (x[0], sum(x))))


def ticks(spans: list[tuple[int, int]]) -> set[int]:
    return {tick for start, stop in spans for tick in range(start, stop)}


@given(SPANS, SPANS)
def test_without_is_a_difference_of_sets(spans: Any, others: Any) -> None:
    left = without(spans, others)
    assert ticks(left) == ticks(spans) - ticks(others)
    assert length(left) == len(ticks(left))  # nothing twice
    assert left == sorted(left)


@given(SPANS)
def test_joined_is_the_same_time(spans: Any) -> None:
    found = joined(spans)
    assert ticks(found) == ticks(spans)
    assert all(a[1] < b[0] for a, b in pairwise(found))


def kernel(name: str, start: float, stop: float, cat: str = "kernel", **about: Any) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": stop - start, "args": about}


SP = {"Process Group Description": "mesh_sp", "Group size": 4}
#: As a profile of a ring under FSDP2 has them: microseconds, several streams.
TRACE = {
    "traceEvents": [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9000},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "nccl:all_gather", "ts": 0, "dur": 9000},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 0},
        kernel("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", 1000, 3000, stream=7),
        kernel("flash_bwd_kernel", 3500, 6000, stream=7),
        kernel(
            "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 2000, 3700,
            **{"Collective name": "all_to_allv"}, **SP,
        ),
        kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 0, 1400),
        kernel(
            "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(x)", 5500, 7000,
            **{"Collective name": "_reduce_scatter_base"}, **SP,
        ),
        kernel("Memcpy DtoD (Device -> Device)", 6500, 6600, "gpu_memcpy"),
        kernel("Memcpy DtoH (Device -> Pinned)", 6900, 7200, "gpu_memcpy"),
        kernel("Memset (Device)", 7100, 7150, "gpu_memset"),
    ]
}  # fmt: skip


def test_a_recorded_step() -> None:
    found = exposure(kernels_of(TRACE))
    assert found.compute == pytest.approx(2 + 2.5 + 0.1 + 0.05)
    assert found.communication == pytest.approx(1.7 + 1.4 + 1.5 + 0.3)
    assert found.by_name == pytest.approx(
        {
            "AllGather": 1.0,  # before the first product
            "all_to_allv over mesh_sp": 0.5,  # between product and attention
            "reduce_scatter_base over mesh_sp": 0.9,  # 6.0 to 7.0 but for the copy on the GPU
            "Memcpy DtoH": 0.25,  # 6.9 to 7.2 but for the memset
        }
    )
    assert found.exposed == pytest.approx(1.0 + 0.5 + 0.9 + 0.15)  # 6.9 to 7.0 has two names
    assert str(found).startswith("exposed: AllGather 1.00, reduce_scatter_base over mesh_sp 0.90,")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ncclKernel_AllReduce_RING_LL_Sum_float(ncclDevComm*)", "AllReduce"),
        ("ncclDevKernel_Broadcast_RING_LL(x)", "Broadcast"),
        ("Memcpy PtoP (Device -> Device)", "Memcpy PtoP"),
        ("void at::native::vectorized_elementwise_kernel", ""),
        ("triton_poi_fused_nccl_add", ""),
    ],
)
def test_what_a_kernel_sends(name: str, said: str) -> None:
    assert sends({"name": name}) == said


def test_nothing_is_sent() -> None:
    assert str(exposure([Kernel("", (0, 5))])) == "exposed: nothing"


def test_a_profile_without_kernels_says_so() -> None:
    assert "no kernel" in str(exposure([]))
