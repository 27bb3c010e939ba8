"""What is read of the masks of transformers' models: their meaning, and that nothing n x n is left.

No text of their graphs, which is another with every release. That the numbers are exact is shown on
ranks, by ``tests/ranks/test_models.py``.
"""

from __future__ import annotations

import cases
import pytest
from sampling import sampled
from torch import fx

N = 41  # 11, 11, 11 and 8 rows, or in zigzag 12, 12, 11 and 6: no other size of the models

#: a model, and what the mask of each of its attentions must be
MEANINGS = {
    "llama": (cases.hf_llama_alone, "causal"),
    "llama, padding": (cases.hf_llama, "causal, padding"),
    "llama, packed": (cases.hf_llama_packed, "causal, documents"),
    "mistral": (cases.hf_mistral, "causal, window 6"),
    "bert": (cases.hf_bert, "padding"),
    "t5": (cases.hf_t5_encoder, "float by tiles"),
}


#: Of these the ranks show that they are exact, and what is said of them is said of others, too.
ELSEWHERE = ("llama", "llama, padding", "llama, packed", "bert")


@pytest.mark.parametrize("name", sampled(MEANINGS, ELSEWHERE))
def test_meaning(planned, name: str) -> None:
    build, meaning = MEANINGS[name]
    model, args, inputs = build(2, N)
    plan = planned(model, *args, **inputs)
    assert [a.mask for a in plan.attentions] == [meaning] * 2
    assert not plan.gathered
    for kind in ("forward", "backward"):
        assert not squares(plan.graphs[kind]), plan.graphs[kind]


def squares(graph: fx.Graph) -> list[str]:
    """Tensors with two dims of n: whole masks, whole scores."""
    shapes = {node: getattr(node.meta.get("val"), "shape", ()) for node in graph.nodes}
    return [f"{node}: {list(s)}" for node, s in shapes.items() if list(s).count(N) > 1]
