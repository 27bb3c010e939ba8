"""What masks mean, as the plan says it, and what is left of the programs that made them.

Of the graph before ``analyze_masks`` only the ops that went away are shown, in a row.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable

import cases
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic.report.plan import Plan
from mosaic.report.show import wrapped

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


# --- masks as transformers builds them, in programs of our own -----------------------------------
# What is read of the library's own models is in test_library_masks.py: their text is not ours.

PADDING = cases.padding(2, 11)


def attended(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, *inputs: F.scaled_dot_product_attention(q, q, q, make(*inputs))


def vectors(n: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Of batch, queries and keys: masks are written as functions of three indices."""
    return torch.arange(2).view(2, 1, 1, 1), torch.arange(n)[:, None], torch.arange(n)


def packed(positions: Tensor) -> Tensor:
    """A text begins where positions do not go on."""
    texts = (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1)
    b, q, k = vectors()
    return (k <= q) & (texts[b, q] == texts[b, k])


def test_packed_without_positions(planned, check):
    """Positions of the program itself: there is one text, and nothing is left of it."""
    check(
        read(planned(attended(lambda: packed(torch.arange(11).expand(2, 11))), Q)),
        """\
causal: 11 x 11 of 11=0:2|2:4|4:6,10:11|6:10
- arange expand expand sub diff ne cumsum arange view unsqueeze le index index eq __and__ sdpa
+sdpa: f64[2, 3, 11, 4] = sdpa(q, q, q, is_causal=True)  # causal
""",
    )


def test_packed(planned, check):
    positions = torch.cat([torch.arange(4), torch.arange(7)]).repeat(2, 1)
    check(
        read(planned(attended(packed), Q, positions)),
        """\
causal, documents: 11 x 11 of 11=0:2|2:4|4:6,10:11|6:10
- arange view arange unsqueeze le index index eq __and__ sdpa
+sdpa: f64[2, 3, 11, 4] = mosaic.sdpa(q, q, q, right=0, query_documents=cumsum,
    key_documents=cumsum)  # causal, documents
""",
    )


def test_window_and_packed(planned, check):
    def mask() -> Tensor:
        _, q, k = vectors()
        return packed(torch.arange(11).expand(2, 11)) & (k > q - 2)

    check(
        read(planned(attended(mask), Q)),
        """\
causal, window 2: 11 x 11 of 11=0:3|3:6|6:9|9:11
- arange unsqueeze expand expand sub diff ne cumsum arange view le index index eq __and__ sub gt
- __and__ sdpa
+sdpa: f64[2, 3, 11, 4] = mosaic.sdpa(q, q, q, left=1, right=0)  # causal, window 2
""",
    )


def test_padding_of_integers(planned, check):
    def mask(padding: Tensor) -> Tensor:
        b, q, k = vectors()
        return (k <= q) & padding.bool()[b, k]

    check(
        read(planned(attended(mask), Q, PADDING)),
        """\
causal, padding: 11 x 11 of 11=0:2|2:4|4:6,10:11|6:10
- arange view arange unsqueeze le _to_copy index __and__ sdpa
+unsqueeze_1: i64[2, 1, 11] = unsqueeze(inputs_0, 1)
+unsqueeze_2: i64[2, 1, 1, 11] = unsqueeze(unsqueeze_1, 2)
+ne: b8[2, 1, 1, 11] = ne(unsqueeze_2, 0)
+sdpa: f64[2, 3, 11, 4] = mosaic.sdpa(q, q, q, ne, right=0)  # causal, padding
""",
    )


def test_two_attentions_share_a_mask(planned, check):
    def twice(q: Tensor, padding: Tensor) -> Tensor:
        b, rows, k = vectors()
        mask = (rows >= 0) & padding.bool()[b, k]
        q = F.scaled_dot_product_attention(q, q, q, mask)
        return F.scaled_dot_product_attention(q, q, q, mask)

    check(
        read(planned(twice, Q, PADDING)),
        """\
padding: 11 x 11 of 11=0:3|3:6|6:9|9:11
- arange view arange unsqueeze ge _to_copy index __and__ sdpa sdpa
+unsqueeze_1: i64[2, 1, 11] = unsqueeze(padding, 1)
+unsqueeze_2: i64[2, 1, 1, 11] = unsqueeze(unsqueeze_1, 2)
+ne: b8[2, 1, 1, 11] = ne(unsqueeze_2, 0)
+sdpa: f64[2, 3, 11, 4] = sdpa(q, q, q, ne)  # padding
+sdpa_1: f64[2, 3, 11, 4] = sdpa(sdpa, sdpa, sdpa, ne)  # padding
""",
    )


def test_learned_bias(planned, check):
    """In the way of T5; made tile by tile: of positions, and of the table that is learned
    (``d%1``)."""

    def mask(padding: Tensor, table: Tensor) -> Tensor:
        distance = torch.arange(11) - torch.arange(11)[:, None]
        buckets = torch.where(distance.abs() < 4, distance.abs(), 4)
        bias = F.embedding(buckets + 5 * (distance > 0), table).permute(2, 0, 1)
        return bias.where(padding.bool()[:, None, None], torch.finfo(bias.dtype).min)

    table = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    check(
        read(planned(attended(mask), Q, PADDING, table)),
        """\
float by tiles: 11 x 11 of 11=0:3|3:6|6:9|9:11
- sub abs lt where gt mul add embedding permute where sdpa
+# distance = torch.arange(11) - torch.arange(11)[:, None]
+unsqueeze_3: i64[1, 11] = unsqueeze(arange, 0)
+unsqueeze_4: i64[1, 1, 11] = unsqueeze(unsqueeze_3, 1)
+unsqueeze_5: i64[1, 1, 1, 11] = unsqueeze(unsqueeze_4, 2)
+squeeze: i64[11] = squeeze(unsqueeze, [1])
+unsqueeze_6: i64[1, 11] = unsqueeze(squeeze, 0)
+unsqueeze_7: i64[1, 1, 11] = unsqueeze(unsqueeze_6, 1)
+unsqueeze_8: i64[1, 1, 11, 1] = unsqueeze(unsqueeze_7, 3)
+sdpa: f64[2, 3, 11, 4] = mosaic.sdpa(q, q, q, leaves=[unsqueeze_2, inputs_1, unsqueeze_5,
    unsqueeze_8], tile='float64 d%1: sub.Tensor(%2, %3); abs(%4); lt.Scalar(%5, 4);
    where.ScalarOther(%6, %5, 4); gt.Scalar(%4, 0); mul.Tensor(%8, 5); add.Tensor(%7, %9);
    embedding(%1, %10); where.ScalarOther(%0, %11, -1.7976931348623157e+308)')  # float by tiles
""",
    )


# --- masks that users write ---------------------------------------------------------------------


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
- unsqueeze sdpa
+squeeze_2: f64[6, 11] = squeeze(_unsafe_view, [1])
+unsqueeze_9: f64[6, 1, 11] = unsqueeze(squeeze_2, 1)
+unsqueeze_10: f64[6, 1, 1, 11] = unsqueeze(unsqueeze_9, 2)
+attention: f64[6, 1, 11, 4] = mosaic.sdpa(unsqueeze_3, unsqueeze_4, unsqueeze_5, unsqueeze_10,
    scale=1, right=0)  # causal, bias of keys
""",
    )
