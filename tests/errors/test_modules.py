"""What the eager modules and ``mosaic.attention`` refuse, whole messages."""

from __future__ import annotations

import re

import module_jobs as jobs
import pytest
import torch
from expecttest import assert_expected_inline

import mosaic


def message_of(call, *args, **kwargs) -> str:
    with pytest.raises(mosaic.MosaicError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_heads_that_do_not_divide() -> None:
    text = message_of(mosaic.MultiAxisAttention, 10, 4, 1)
    assert_expected_inline(
        text,
        """\
num_heads does not divide embed_dim
  sizes  embed_dim = 10, num_heads = 4
  fix    use one of 1, 2, 5, 10 for num_heads, or another embed_dim""",
    )


def test_kv_heads_that_do_not_divide() -> None:
    text = message_of(mosaic.MultiAxisAttention, 8, 4, 1, num_kv_heads=3)
    assert_expected_inline(
        text,
        """\
num_kv_heads does not divide num_heads
  sizes  num_heads = 4, num_kv_heads = 3
  fix    use one of 1, 2, 4 for num_kv_heads, or another num_heads""",
    )


def test_unknown_backend() -> None:
    text = message_of(mosaic.MultiAxisAttention, 8, 4, 1, "mesh3d")
    assert_expected_inline(
        text,
        """\
there is no method 'mesh3d'
  fix  use one of 'auto', 'local', 'ring', 'all_gather', 'ulysses', \
or an object such as mosaic.Mesh2D(2, 2)""",
    )


def test_mesh2d_without_a_shape() -> None:
    text = message_of(mosaic.MultiAxisAttention, 8, 4, 1, "mesh2d")
    assert_expected_inline(
        text,
        """\
backend 'mesh2d' needs the shape of the grid
  fix  pass mesh_shape=(rows, cols), with rows x cols the ranks of the mesh axis""",
    )


def test_a_shape_that_nobody_asked_for() -> None:
    text = message_of(mosaic.MultiAxisAttention, 8, 4, 1, "ring", mesh_shape=(2, 2))
    assert_expected_inline(
        text,
        """\
mesh_shape = (2, 2) with backend 'ring'
  fix  leave it out: only 'mesh2d' has a grid of ranks""",
    )


def test_dropout_that_is_no_probability() -> None:
    text = message_of(mosaic.MultiAxisAttention, 8, 4, 1, dropout=1.5)
    assert_expected_inline(
        text,
        """\
dropout = 1.5 is no probability
  fix  use 0 to 1""",
    )


def test_attention_over_embed() -> None:
    text = message_of(mosaic.MultiAxisAttention(8, 4, -1), torch.randn(2, 3, 8))
    assert_expected_inline(
        text,
        """\
the tensor is not (..., axis, ..., embed) with attention over axis -1
  sizes  [2, 3, 8], embed = 8
  fix    the last axis is embed, and attention is over another one""",
    )


def test_an_axis_that_is_not_there() -> None:
    text = message_of(mosaic.MultiAxisAttention(8, 4, 3), torch.randn(2, 3, 8))
    assert_expected_inline(
        text,
        """\
the tensor is not (..., axis, ..., embed) with attention over axis 3
  sizes  [2, 3, 8], embed = 8
  fix    the last axis is embed, and attention is over another one""",
    )


def test_two_axes_that_are_one() -> None:
    module = mosaic.MultiAxisAttention2D(8, 4, 1, -2, (1, 1))
    assert_expected_inline(
        message_of(module, torch.randn(2, 3, 8)),
        """\
axis1 and axis2 are one axis
  sizes  axis 1 of [2, 3, 8]
  fix    name two different dims of the input""",
    )


def test_cross_attention_between_other_batches() -> None:
    module = mosaic.CrossAxisAttention(8, 4, 1, 1)
    text = message_of(module, torch.randn(2, 3, 8), torch.randn(3, 5, 8))
    assert_expected_inline(
        text,
        """\
the two tensors differ in another axis than those that attend
  sizes  [2, 3, 8] without axis 1, [3, 5, 8] without axis 1
  fix    expand the axes that one of them lacks""",
    )


Q = torch.randn(2, 4, 5, 3)


def test_three_dims() -> None:
    assert_expected_inline(
        message_of(mosaic.attention, Q[0], Q[0], Q[0]),
        """\
q, k and v are not (batch, heads, seq, head_dim)
  sizes  q [4, 5, 3], k [4, 5, 3], v [4, 5, 3]
  fix    fold other dims into the batch, and give one head a dim of 1""",
    )


def test_q_k_and_v_that_do_not_fit() -> None:
    assert_expected_inline(
        message_of(mosaic.attention, Q, Q, Q[:, :, :4]),
        """\
q, k and v do not fit together
  sizes  q [2, 4, 5, 3], k [2, 4, 5, 3], v [2, 4, 4, 3]
  fix    q and k share batch and head_dim; k and v share batch, heads and keys""",
    )


def test_kv_heads_of_shards() -> None:
    assert_expected_inline(
        message_of(mosaic.attention, Q, Q[:, :3], Q[:, :3]),
        """\
the KV heads do not divide the heads
  sizes  heads = 4, KV heads = 3
  fix    use a number of KV heads that divides the heads""",
    )


def test_dtypes() -> None:
    assert_expected_inline(
        message_of(mosaic.attention, Q, Q.half(), Q),
        """\
q, k and v are not of one floating dtype
  dtypes  torch.float32, torch.float16, torch.float32
  fix     cast them to one, such as q.dtype""",
    )


def test_a_window_of_minus_one() -> None:
    assert_expected_inline(
        message_of(mosaic.attention, Q, Q, Q, window=(-1, 0)),
        """\
window: left = -1 is no number of keys
  fix  use 0 or more, or None where it is unbounded""",
    )


def test_a_mask_with_other_columns() -> None:
    mask = torch.ones(5, 4, dtype=torch.bool)
    assert_expected_inline(
        message_of(mosaic.attention, Q, Q, Q, mask=mask),
        """\
the mask is not (batch, heads, this rank's rows, all keys)
  sizes  [1, 1, 5, 4] given, [2, 4, 5, 5] wanted, or 1 for any
  fix    cut its rows as the queries are cut, and leave its columns whole""",
    )


def test_a_mask_of_integers() -> None:
    mask = torch.ones(5, 5, dtype=torch.int64)
    assert_expected_inline(
        message_of(mosaic.attention, Q, Q, Q, mask=mask),
        """\
the mask is torch.int64
  fix  use a boolean one, or numbers added to the scores""",
    )


def test_documents_of_another_length() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    assert_expected_inline(
        message_of(mosaic.attention, Q, Q, Q, query_documents=ids),
        """\
query_documents are not (batch, all queries)
  sizes  [2, 4] given, (2 or 1, 5) wanted
  fix    give the ids of the whole axis, and not of this rank's part""",
    )


def test_documents_of_keys_alone() -> None:
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert_expected_inline(
        message_of(mosaic.attention, Q, Q, Q, key_documents=ids),
        """\
key_documents without query_documents
  fix  give the ids of all queries, too""",
    )


def test_a_list_for_a_tensor() -> None:
    assert_expected_inline(
        message_of(mosaic.attention, [Q], Q, Q),
        """\
q is no tensor
  type  list
  fix   pass a torch.Tensor""",
    )


def test_devices() -> None:
    assert_expected_inline(
        message_of(mosaic.attention, Q, Q.to("meta"), Q),
        """\
q, k and v are not on one device
  devices  cpu, meta, cpu
  fix      move them to one, such as q.device""",
    )


def test_a_window_that_is_no_pair() -> None:
    assert_expected_inline(
        message_of(mosaic.attention, Q, Q, Q, window=3),
        """\
window = 3 is no pair of bounds
  fix  give keys to the left and to the right: window=(128, 0), None where unbounded""",
    )
    assert_expected_inline(
        message_of(mosaic.attention, Q, Q, Q, window=(1.5, 0)),
        """\
window: left = 1.5 is no number of keys
  fix  use 0 or more, or None where it is unbounded""",
    )


def test_dropout_of_more_than_everything() -> None:
    assert_expected_inline(
        message_of(mosaic.attention, Q, Q, Q, dropout=2),
        """\
dropout = 2 is no probability
  fix  use 0 to 1""",
    )


def test_documents_of_each_head() -> None:
    ids = torch.zeros(2, 4, 5)
    assert_expected_inline(
        message_of(mosaic.attention, Q, Q, Q, query_documents=ids),
        """\
query_documents has more than 2 dims
  sizes  [2, 4, 5]
  fix    a mask is (batch, heads, queries, keys), documents are (batch, tokens)""",
    )


def test_heads_that_are_no_number() -> None:
    assert_expected_inline(
        message_of(mosaic.MultiAxisAttention, 8, 2.0, 1),
        """\
num_heads = 2.0 is no whole number
  fix  use 1 or more""",
    )
    assert_expected_inline(
        message_of(mosaic.MultiAxisAttention, 0, 1, 1),
        """\
embed_dim = 0 is not enough
  fix  use 1 or more""",
    )
    assert_expected_inline(
        message_of(mosaic.MultiAxisAttention, 10**12, 3, 1),
        """embed_dim = 1000000000000 is too much
  fix  use less than 2147483648""",
    )


def test_an_axis_by_its_name() -> None:
    module = mosaic.MultiAxisAttention(8, 2, "rows")
    assert_expected_inline(
        message_of(module, torch.randn(2, 3, 8)),
        """\
axis 'rows' is no number of a dim
  sizes  [2, 3, 8]
  fix    use a whole number, such as 1 or -2""",
    )


def test_a_grid_that_is_a_number() -> None:
    assert_expected_inline(
        message_of(mosaic.MultiAxisAttention, 8, 4, 1, "mesh2d", 4),
        """\
mesh_shape = 4 is no grid
  fix  give two sizes""",
    )


@pytest.fixture(scope="module")
def on_two_ranks(ranks) -> dict[str, str]:
    text = ranks(2).run(jobs.messages, 2)[1]
    return {name: re.sub(r"\.py:\d+", ".py:LINE", words) for name, words in text.items()}


def test_unequal_shards(on_two_ranks) -> None:
    assert_expected_inline(
        on_two_ranks["unequal"],
        """\
the ranks hold shards of different sizes, and no layout says who holds what
  sizes  rank 0: [2, 4, 4, 2], rank 1: [2, 4, 3, 2]
  fix    if the axis is cut as torch.chunk does, pass layout=mosaic.Layout.even(7, 2)""",
    )


def test_a_shard_that_is_not_its_part(on_two_ranks) -> None:
    assert_expected_inline(
        on_two_ranks["part"],
        """\
q is not the part that layout says
  sizes   seq = 3, layout has 4 on rank 1
  layout  8=0:4|4:8
  fix     cut it with mosaic.shard_tensor(whole, 2, layout=layout), or name its own""",
    )


def test_a_layout_for_other_ranks(on_two_ranks) -> None:
    assert_expected_inline(
        on_two_ranks["ranks"],
        """\
layout is for 3 ranks, and this attention is done by 2
  layout  8=0:3|3:6|6:8
  fix     make it for the ranks of 'sp'; with 'local' the axis is not cut""",
    )


def test_a_layout_that_holds_twice(on_two_ranks) -> None:
    assert_expected_inline(
        on_two_ranks["twice"],
        """\
layout holds an index twice, or leaves one out
  layout  4=0:3|0:3
  fix     every index belongs to one rank, or all of them to every rank (Layout.whole)""",
    )


def test_local_over_a_cut_axis(on_two_ranks) -> None:
    assert_expected_inline(
        on_two_ranks["local"],
        """\
layout is for 2 ranks, and this attention is done by 1
  layout  8=0:4|4:8
  fix     make it for the ranks of 'sp'; with 'local' the axis is not cut""",
    )


def test_a_grid_that_does_not_fit(on_two_ranks) -> None:
    assert_expected_inline(
        on_two_ranks["grid"],
        """\
Mesh2D(2, 2) does not fit 2 ranks
  sizes  2 x 2 = 4, ranks = 2
  fix    choose rows x cols equal to the ranks of the mesh axis""",
    )


def test_two_axes_on_a_grid_that_does_not_fit(on_two_ranks) -> None:
    assert_expected_inline(
        on_two_ranks["2d"],
        """\
Mesh2D(2, 2) does not fit 2 ranks
  sizes  2 x 2 = 4, ranks = 2
  fix    choose rows x cols equal to the ranks of the mesh axis""",
    )


def test_a_composition_that_does_not_fit(on_two_ranks) -> None:
    assert_expected_inline(
        on_two_ranks["composed"],
        """\
mesh_shape = (2, 2) does not fit 2 ranks
  sizes  2 x 2 = 4, ranks = 2
  fix    choose heads x sequence equal to the ranks of the mesh axis""",
    )


def test_a_mask_whose_gradient_is_ambiguous(on_two_ranks) -> None:
    assert_expected_inline(
        on_two_ranks["single"],
        """\
a mask needs a gradient, and a rank has a single query
  layout  2=0:1|1:2
  fix     give every rank two queries or none: one row could be everybody's""",
    )


def test_a_bare_attention_beside_mosaics(on_two_ranks) -> None:
    assert_expected_inline(
        on_two_ranks["bare"],
        """\
an attention beside Mosaic's own, in a program that works on shards already
  tests/ranks/module_jobs.py:LINE in bare
    return attn(x) + F.scaled_dot_product_attention(x, x, x)
  fix  use mosaic.attention(q, k, v, method), with 'local' if its axis is not cut""",
    )


def test_an_attention_with_sinks_beside_mosaics(on_two_ranks) -> None:
    assert_expected_inline(
        on_two_ranks["sinks"],
        """\
an attention beside Mosaic's own, in a program that works on shards already
  tests/ranks/module_jobs.py:LINE in with_sinks
    return attn(x) + scores.softmax(-1)[..., :-1] @ x
  fix  use mosaic.attention(q, k, v, method), with 'local' if its axis is not cut""",
    )


def test_a_spec_that_cuts_shards(on_two_ranks) -> None:
    assert_expected_inline(
        on_two_ranks["spec"],
        """\
this program works on shards already, and the spec cuts an axis
  tests/ranks/module_jobs.py:LINE in whole
    return attn(x)
  axes  'rows'
  fix   compile it without axes, or write it for whole tensors, without Mosaic's modules""",
    )
