"""Unmodified models on real ranks: the loss and every gradient are those of one process.

CI runs what no other test shows; ``pytest -m full`` runs every model.
"""

from __future__ import annotations

from functools import partial

import pytest
from cases import BY_METHOD, CASES
from compare import assert_close, compare_gradients
from model_jobs import run_by_method, run_model
from sampling import FULL, sampled

from mosaic import (
    AllGather,
    Composed,
    Hierarchical,
    Mesh2D,
    Method,
    Ring,
    ShardingSpec,
    Ulysses,
)


def tolerance(name: str) -> float:
    """Our models run in float64, transformers' in float32."""
    return 1e-5 if name.startswith("hf_") else 1e-10


def check(ranks, name: str, p: int, inner: str = "eager", **sizes: int) -> None:
    build, spec = CASES[name]
    build = partial(build, **sizes)
    options = {"inner": inner, **({"spec": spec} if spec else {})}
    want = run_model(build, None)
    for rank, got in enumerate(ranks(p).run(run_model, build, options, p, timeout=900)):
        assert_close(f"loss of rank {rank}", got["loss"], want["loss"], tolerance(name))
        compare_gradients(want["gradients"], got["gradients"], tolerance(name))


#: What each shows another case shows, too, or another test: behind the marker on three ranks.
ELSEWHERE = (
    "gpt",
    "gpt_gather",
    "hf_bert",
    "hf_gemma2_alone",
    "hf_llama",
    "hf_llama_checkpointing",
    "hf_llama_packed",
    "hf_llama_packed_auto",
    "hf_mistral",
    "hf_qwen3_next",
    "hf_t5",
    "hf_mixtral",
    "llama",
    "relative",
    "table",
    "table_auto",
    "table_few",
    "vit_mean",
)


@pytest.mark.parametrize("name", sampled(CASES, (*ELSEWHERE, "hf_gemma2")))
def test_three_ranks(ranks, name: str) -> None:
    check(ranks, name, 3)


def test_two_ranks(ranks) -> None:
    """A library's model: it takes the longest to compile."""
    check(ranks, "hf_gemma2", 2)


@pytest.mark.full
@pytest.mark.parametrize("name", ["gpt", "table"])
def test_through_inductor(ranks, name: str) -> None:
    """Equal shards, which share their compiled kernels: uneven ones take thrice as long."""
    sizes = {"rows": 36} if name == "table" else {"n": 36, "layers": 2}
    check(ranks, name, 2, "inductor", **sizes)


@pytest.mark.full
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_matrix(ranks, name: str, p: int, batch: int, inner: str) -> None:
    if name == "table_tiny" and batch == 3:
        pytest.skip("the tiny table is about empty shards, not about batches")
    check(ranks, name, p, inner, batch=batch)


# --- every method -------------------------------------------------------------------------------

COMPOSED = Composed(Ulysses(mesh="h"), Ring(mesh="s", stages=2))
NODES = {
    "mesh2d(2, 2)": Mesh2D(2, 2),
    "hierarchical(2, local, ring)": Hierarchical(2, "local"),
    "hierarchical(2, ulysses, ring)": Hierarchical(2, "ulysses"),
    "ulysses(2) x ring(stages=2)": COMPOSED,
}


def methods(p: int) -> dict[str, Method | str]:
    """Methods by their names in the plan; grids and nodes are for 4 ranks."""
    found: dict[str, Method | str] = {f"ring(stages={n})": Ring(stages=n) for n in {2, p}}
    found |= {"all_gather": AllGather(), "auto": "auto"}
    found |= {f"ulysses({p})": Ulysses()}
    return found | (NODES if p == 4 else {f"mesh2d(1, {p})": Mesh2D(1, p)})


def check_method(ranks, name: str, p: int, method: str) -> None:
    build, inputs = BY_METHOD[name]
    axis = next(iter(inputs.values())).split()[1]
    spec = ShardingSpec(inputs=inputs, axes={axis: methods(p)[method]}, on_gather="error")
    mesh = {"sp_size": p}
    if methods(p)[method] is COMPOSED:
        mesh = {"mesh_shape": (2, 2), "mesh_axes": ("h", "s")}
    want = run_model(build, None)
    options = {"inner": "eager", "spec": spec}
    for rank, got in enumerate(ranks(p).run(run_by_method, build, options, **mesh)):
        # Ulysses may hand over to a ring: 3 ranks divide no heads, and in the table there are none
        # to cut, as nn.MultiheadAttention makes batches of them.
        if method != "auto" and name != "table" and p != 3:
            assert got["methods"] == {method}
        assert_close(f"loss of rank {rank}", got["loss"], want["loss"], 1e-10)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        FULL("table", "ring(stages=4)"),
        FULL("llama", "ulysses(4)"),
        ("llama", "ulysses(2) x ring(stages=2)"),
        FULL("llama", "hierarchical(2, ulysses, ring)"),
        FULL("llama", "auto"),
        FULL("window", "ring(stages=4)"),
        FULL("documents", "mesh2d(2, 2)"),
        FULL("relative", "ulysses(4)"),
    ],
)
def test_methods(ranks, name: str, method: str) -> None:
    check_method(ranks, name, 4, method)


@pytest.mark.full
@pytest.mark.parametrize("p, method", [(p, method) for p in (2, 3, 4) for method in methods(p)])
@pytest.mark.parametrize("name", BY_METHOD)
def test_every_method(ranks, name: str, p: int, method: str) -> None:
    check_method(ranks, name, p, method)
