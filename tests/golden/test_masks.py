"""What masks mean, as the plan says it, and what is left of the programs that made them.

Of the graph before ``analyze_masks`` only the ops that went away are shown, in a row.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any

import cases
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic.plan import Plan
from mosaic.show import wrapped

Q = torch.randn(2, 3, 11, 4, dtype=torch.float64)
DOCUMENTS = torch.arange(22).view(2, 11) // 4


def read(plan: Plan) -> str:
    """The plan's words and layout, then ``- ops that are gone`` and ``+ what stands there now``."""
    lines = plan.diffs["analyze_masks"].replace("\n+    ", " ").replace("\n-    ", " ").splitlines()
    gone = [re.search(r"\] = ([\w.]+)", line) for line in lines if line[0] == "-"]
    ops = textwrap.wrap(" ".join(found[1] for found in gone if found), 98)
    found = plan.attentions[0]
    head = f"{found.mask or 'full'}: {found.queries} x {found.keys} of {plan.layout}"
    new = [part for line in lines if line[0] == "+" for part in wrapped(line)]
    return "\n".join([head, *(f"- {line}" for line in ops), *new])


def one_layer(config: type, model: type, **options: Any) -> nn.Module:
    return model(config(**{**cases.CAUSAL_LM, "num_hidden_layers": 1, **options}))


def ids(n: int = 11) -> Tensor:
    return torch.randint(0, 29, (2, n))


# --- unmodified models --------------------------------------------------------------------------


def test_llama_without_a_mask(planned, check):
    from transformers import LlamaConfig, LlamaForCausalLM

    check(
        read(planned(one_layer(LlamaConfig, LlamaForCausalLM), ids())),
        """\
causal: 11 x 11 of 11=0:2|2:4|4:6,10:11|6:10
- expand expand sub diff ne cumsum arange unsqueeze unsqueeze unsqueeze unsqueeze unsqueeze
- unsqueeze new_ones index index eq __and__ index index le __and__ expand sdpa
+sdpa: f32[2, 4, 11, 8] = sdpa(add_4, add_5, transpose_2, is_causal=True, scale=0.3536,
    enable_gqa=True)  # causal
""",
    )


def test_llama_with_padding(planned, check):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = one_layer(LlamaConfig, LlamaForCausalLM)
    check(
        read(planned(model, ids(), attention_mask=cases.padding(2, 11))),
        """\
causal, padding: 11 x 11 of 11=0:2|2:4|4:6,10:11|6:10
- _to_copy arange unsqueeze unsqueeze unsqueeze unsqueeze unsqueeze unsqueeze new_ones le __and__
- index __and__ expand sdpa
+unsqueeze_15: i64[2, 1, 11] = unsqueeze(kwargs_attention_mask, 1)
+unsqueeze_16: i64[2, 1, 1, 11] = unsqueeze(unsqueeze_15, 2)
+ne: b8[2, 1, 1, 11] = ne(unsqueeze_16, 0)
+sdpa: f32[2, 4, 11, 8] = mosaic.sdpa(add_4, add_5, transpose_2, ne, scale=0.3536,
    enable_gqa=True, right=0)  # causal, padding
""",
    )


def test_llama_packed(planned, check):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = one_layer(LlamaConfig, LlamaForCausalLM)
    positions = torch.cat([torch.arange(4), torch.arange(7)]).repeat(2, 1)
    check(
        read(planned(model, ids(), position_ids=positions)),
        """\
causal, documents: 11 x 11 of 11=0:2|2:4|4:6,10:11|6:10
- expand arange arange add unsqueeze unsqueeze unsqueeze unsqueeze unsqueeze unsqueeze unsqueeze
- new_ones index index eq __and__ index index le __and__ expand sdpa
+sdpa: f32[2, 4, 11, 8] = mosaic.sdpa(add_3, add_4, transpose_2, scale=0.3536, enable_gqa=True,
    right=0, query_documents=cumsum, key_documents=cumsum)  # causal, documents
""",
    )


def test_mistral(planned, check):
    from transformers import MistralConfig, MistralForCausalLM

    check(
        read(planned(one_layer(MistralConfig, MistralForCausalLM, sliding_window=2), ids())),
        """\
causal, window 2: 11 x 11 of 11=0:3|3:6|6:9|9:11
- expand expand sub diff ne cumsum arange unsqueeze unsqueeze unsqueeze unsqueeze unsqueeze
- unsqueeze new_ones index index eq __and__ index index new_ones sub gt __and__ le __and__ __and__
- expand sdpa
+sdpa: f32[2, 4, 11, 8] = mosaic.sdpa(add_4, add_5, transpose_2, scale=0.3536, enable_gqa=True,
    left=1, right=0)  # causal, window 2
""",
    )


def test_bert(planned, check):
    model, _, inputs = cases.hf_bert(2, 11)
    check(
        read(planned(model, **inputs)),
        """\
padding: 11 x 11 of 11=0:3|3:6|6:9|9:11
- _to_copy arange arange add unsqueeze unsqueeze unsqueeze unsqueeze unsqueeze unsqueeze unsqueeze
- new_ones ge __and__ index __and__ expand sdpa sdpa
+unsqueeze_9: i64[2, 1, 11] = unsqueeze(kwargs_attention_mask, 1)
+unsqueeze_10: i64[2, 1, 1, 11] = unsqueeze(unsqueeze_9, 2)
+ne: b8[2, 1, 1, 11] = ne(unsqueeze_10, 0)
+sdpa: f32[2, 4, 11, 8] = sdpa(transpose, transpose_1, transpose_2, ne, scale=0.3536)  # padding
+sdpa_1: f32[2, 4, 11, 8] = sdpa(transpose_4, transpose_5, transpose_6, ne, scale=0.3536)  #
    padding
""",
    )


def test_t5_with_a_learned_bias(planned, check):
    """The bias is made tile by tile: of positions, and of the table that is learned (``d%2``)."""
    from transformers import T5EncoderModel

    config = cases.hf_t5(2, 11)[0].config
    config.num_layers = 1
    model = T5EncoderModel(config)
    plan = planned(model, ids(), attention_mask=cases.padding(2, 11))
    check(
        read(plan),
        """\
float by tiles: 11 x 11 of 11=0:3|3:6|6:9|9:11
- __and__ expand sub gt _to_copy mul add abs lt _to_copy div log div mul _to_copy add full_like min
- where add embedding permute unsqueeze where clone sdpa
+squeeze: i64[11] = squeeze(unsqueeze_10, [0])
+unsqueeze_12: i64[1, 11] = unsqueeze(squeeze, 0)
+unsqueeze_13: i64[1, 1, 11] = unsqueeze(unsqueeze_12, 1)
+unsqueeze_14: i64[1, 1, 1, 11] = unsqueeze(unsqueeze_13, 2)
+# context_position = torch.arange(query_length, dtype=torch.long, device=device)[:, None] +
    past_seen_tokens
+squeeze_1: i64[11] = squeeze(add_3, [1])
+unsqueeze_15: i64[1, 11] = unsqueeze(squeeze_1, 0)
+unsqueeze_16: i64[1, 1, 11] = unsqueeze(unsqueeze_15, 1)
+unsqueeze_17: i64[1, 1, 11, 1] = unsqueeze(unsqueeze_16, 3)
+sdpa: f32[2, 4, 11, 8] = mosaic.sdpa(transpose, transpose_1, transpose_2, scale=1, leaves=[and_1,
    index, encoder_block_0_layer_0_SelfAttention_relative_attention_bias_weight, unsqueeze_14,
    unsqueeze_17], tile='float32 d%2: __and__.Tensor(%0, %1); sub.Tensor(%3, %4); gt.Scalar(%6,
    0); _to_copy(%7, dtype=torch.int64); mul.Tensor(%8, 16); add.Tensor(%9, 0); abs(%6);
    lt.Scalar(%11, 8); _to_copy(%11, dtype=torch.float32); div.Tensor(%13, 8); log(%14);
    div.Tensor(%15, 2.772588722239781); mul.Tensor(%16, 8); _to_copy(%17, dtype=torch.int64);
    add.Tensor(%18, 8); filled(15, torch.int64); min.other(%19, %20); where.self(%12, %11, %21);
    add.Tensor(%10, %22); embedding(%2, %23); where.ScalarOther(%5, %24,
    -3.4028234663852886e+38)')  # float by tiles
""",
    )


# --- masks that users write ---------------------------------------------------------------------


def attended(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, *inputs: F.scaled_dot_product_attention(q, q, q, make(*inputs))


def test_tril(planned, check):
    check(
        read(planned(attended(lambda: torch.tril(torch.ones(11, 11)).bool()), Q)),
        """\
causal: 11 x 11 of 11=0:2|2:4|4:6,10:11|6:10
- ones tril _to_copy sdpa
+sdpa: f64[2, 3, 11, 4] = sdpa(q, q, q, is_causal=True)  # causal
""",
    )


def test_documents(planned, check):
    def mask(ids: Tensor) -> Tensor:
        before = torch.arange(11)[:, None] >= torch.arange(11)
        return (ids[:, None, :, None] == ids[:, None, None, :]) & before

    check(
        read(planned(attended(mask), Q, DOCUMENTS)),
        """\
causal, documents: 11 x 11 of 11=0:2|2:4|4:6,10:11|6:10
- arange unsqueeze ge unsqueeze unsqueeze unsqueeze eq __and__ sdpa
+sdpa: f64[2, 3, 11, 4] = mosaic.sdpa(q, q, q, right=0, query_documents=inputs_0,
    key_documents=inputs_0)  # causal, documents
""",
    )


def test_what_cannot_be_read_stays(planned, check):
    def mask(table: Tensor) -> Tensor:
        return table & (torch.arange(11)[:, None] >= torch.arange(11))

    check(
        read(planned(attended(mask), Q, torch.rand(11, 11) > 0.1)),
        """\
causal, dense boolean: 11 x 11 of 11=0:2|2:4|4:6,10:11|6:10
- arange unsqueeze ge __and__ sdpa
+unsqueeze_1: b8[1, 11, 11] = unsqueeze(inputs_0, 0)
+unsqueeze_2: b8[1, 1, 11, 11] = unsqueeze(unsqueeze_1, 1)
+sdpa: f64[2, 3, 11, 4] = mosaic.sdpa(q, q, q, unsqueeze_2, right=0)  # causal, dense boolean
""",
    )


def test_a_bias_and_a_triangle(planned, check):
    def mask(bias: Tensor) -> Tensor:
        return bias + nn.Transformer.generate_square_subsequent_mask(11, dtype=torch.float64)

    check(
        read(planned(attended(mask), Q, torch.randn(3, 11, 11, dtype=torch.float64))),
        """\
causal, dense float: 11 x 11 of 11=0:2|2:4|4:6,10:11|6:10
- full triu add sdpa
+unsqueeze: f64[1, 3, 11, 11] = unsqueeze(inputs_0, 0)
+sdpa: f64[2, 3, 11, 4] = mosaic.sdpa(q, q, q, unsqueeze, right=0)  # causal, dense float
""",
    )


def test_multihead_attention(planned, check):
    """Its two masks come as floats, added; with weights, and so without SDPA."""
    module = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(3, 11, 8, dtype=torch.float64)
    padding = cases.padding(3, 11) == 0

    def run(x: Tensor, padding: Tensor) -> Tensor:
        after = torch.ones(11, 11, dtype=torch.bool).triu(1)
        return module(x, x, x, key_padding_mask=padding, attn_mask=after)[0]

    check(
        read(planned(run, x, padding)),
        """\
causal, bias of keys: 11 x 11 of 11=0:2|2:4|4:6,10:11|6:10
- ones triu zeros_like masked_fill unsqueeze add unsqueeze sdpa
+squeeze_2: f64[6, 11] = squeeze(_unsafe_view, [1])
+unsqueeze_7: f64[6, 1, 11] = unsqueeze(squeeze_2, 1)
+unsqueeze_8: f64[6, 1, 1, 11] = unsqueeze(unsqueeze_7, 2)
+attention: f64[6, 1, 11, 4] = mosaic.sdpa(unsqueeze_3, unsqueeze_4, unsqueeze_5, unsqueeze_8,
    scale=1, right=0)  # causal, bias of keys
""",
    )
