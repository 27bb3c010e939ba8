"""Attentions as people write them, of q, k, v (2, 3, 8, 4), and programs that only look like one.

``pad`` (2, 8) is true at keys that are hidden: in the second batch at all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

N = 8
INF = float("inf")
Program = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ATTENTIONS: dict[str, Program] = {}
OTHERS: dict[str, Program] = {}


def attention(program: Program) -> Program:
    ATTENTIONS[program.__name__] = program
    return program


def other(program: Program) -> Program:
    OTHERS[program.__name__] = program
    return program


def product(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def lower() -> Tensor:
    return torch.ones(N, N).tril()


# --- products -------------------------------------------------------------------------------------


@attention
def einsum(q, k, v, pad):
    weights = (torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.5).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


@attention
def einsum_heads_behind(q, k, v, pad):
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / 2, -1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@attention
def einsum_keys_first(q, k, v, pad):
    weights = torch.einsum("...jd,...id->...ij", k, q).softmax(-1)
    return torch.einsum("...jd,...ij->...id", v, weights)


@attention
def einsum_one_kv_head(q, k, v, pad):
    weights = torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", weights, v[:, 0])


@attention
def einsum_groups(q, k, v, pad):
    q, k, v = q[:, :2].unsqueeze(1), k[:, :1], v[:, :1]
    weights = torch.einsum("bghid,bgjd->bghij", q, k).softmax(-1)
    return torch.einsum("bghij,bgjd->bghid", weights, v)


@attention
def three_dims(q, k, v, pad):
    return torch.bmm((torch.bmm(q[:, 0], k[:, 0].mT) * 0.5).softmax(-1), v[:, 0])


@attention
def permuted_keys(q, k, v, pad):
    k = k.transpose(1, 2).contiguous()
    return torch.matmul(q, k.permute(0, 2, 3, 1)).softmax(-1) @ v


@attention
def views(q, k, v, pad):  # OPT and BART once
    q, k, v = (x.reshape(6, N, 4) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(2, 3, N, N)
    scores = scores + torch.full((N, N), -INF, dtype=q.dtype).triu(1)
    return torch.bmm(scores.view(6, N, N).softmax(-1), v).view(2, 3, N, 4)


@attention
def alibi_baddbmm(q, k, v, pad):  # Bloom
    q, k, v = (x.reshape(6, N, 4) for x in (q, k, v))
    alibi = torch.arange(N, dtype=q.dtype).expand(6, 1, N) * 0.3
    scores = alibi.baddbmm(q, k.transpose(1, 2), beta=1.0, alpha=0.5).view(2, 3, N, N)
    scores = scores.masked_fill(lower() == 0, torch.finfo(scores.dtype).min)
    return torch.bmm(F.softmax(scores, -1).view(6, N, N), v)


@attention
def no_bias_baddbmm(q, k, v, pad):
    q, k, v = (x.reshape(6, N, 4) for x in (q, k, v))
    scores = torch.baddbmm(q.new_empty(6, N, N), q, k.mT, beta=0, alpha=0.5)
    return torch.bmm(scores.softmax(-1), v)


# --- scales ---------------------------------------------------------------------------------------


@attention
def scale_in_a_tensor(q, k, v, pad):
    return (product(q, k) / torch.sqrt(torch.tensor([4.0]))).softmax(-1) @ v


@attention
def scale_of_each_head(q, k, v, pad):
    return (product(q, k) * v.mean((0, 2, 3))[:, None, None].exp()).softmax(-1) @ v


@attention
def less_the_maximum(q, k, v, pad):
    scores = product(q, k)
    return (scores - scores.amax(dim=-1, keepdim=True).detach()).softmax(-1) @ v


# --- softcaps -------------------------------------------------------------------------------------


@attention
def softcap(q, k, v, pad):  # Gemma 2
    scores = torch.tanh(product(q, k) * 0.5 / 2.0) * 2.0
    scores = scores + torch.full((N, N), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    return scores.softmax(-1) @ v


@attention
def softcap_of_padding(q, k, v, pad):
    scores = 3.0 * torch.tanh(product(q, k) * (1 / 3.0))
    return scores.masked_fill(pad[:, None, None], -1e9).softmax(-1) @ v


@attention
def softcap_views(q, k, v, pad):  # Grok
    q, k, v = (x.reshape(6, N, 4) for x in (q, k, v))
    scores = (torch.bmm(q, k.mT).view(2, 3, N, N) / 2.0).tanh().mul(2.0)
    scores = scores.masked_fill(lower() == 0, -INF) + torch.arange(3)[:, None, None] * 0.1
    return torch.bmm(scores.view(6, N, N).softmax(-1), v).view(2, 3, N, 4)


@attention
def softcap_and_distances(q, k, v, pad):  # the mask is a program with leaves of its own
    scores = torch.tanh(product(q, k) / 2.0) * 2.0
    apart = torch.arange(N) - torch.arange(N)[:, None]
    return (scores + v.mean((0, 2, 3))[:, None, None] * apart.abs().sqrt()).softmax(-1) @ v


@attention
def softcap_twice(q, k, v, pad):
    return (((product(q, k) / 4).tanh() * 4).tanh() * 2 / 3).softmax(-1) @ v


# --- masks ----------------------------------------------------------------------------------------


@attention
def transformers_eager(q, k, v, pad):
    mask = torch.full((N, N), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    weights = F.softmax(product(q, k) * 0.5 + mask[None, None], dim=-1, dtype=q.dtype)
    return torch.matmul(F.dropout(weights.to(q.dtype), 0.0, True), v)


@attention
def filled_low(q, k, v, pad):
    return product(q, k).masked_fill(lower() == 0, -1e9).softmax(-1) @ v


@attention
def where_low(q, k, v, pad):  # GPT-2
    scores = product(q, k)
    lowest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
    return torch.where(lower().bool(), scores, lowest).softmax(-1) @ v


@attention
def where_infinite(q, k, v, pad):
    return torch.where(lower() == 0, -INF, product(q, k)).softmax(-1) @ v


@attention
def padding_low(q, k, v, pad):  # the annotated transformer: a row that sees nothing sees all
    return product(q, k).masked_fill(pad[:, None, None], -1e9).softmax(-1) @ v


@attention
def causal_padding_low(q, k, v, pad):
    seen = (~pad)[:, None, None] & lower().bool()
    return product(q, k).masked_fill(seen == 0, -1e4).softmax(-1) @ v


@attention
def biased_padding_low(q, k, v, pad):
    scores = product(q, k) + product(v, v)
    return scores.masked_fill(pad[:, None, None], -1e9).softmax(-1) @ v


@attention
def infinite_and_low(q, k, v, pad):  # a row without a key to see weighs the padding
    scores = product(q, k) + torch.full((N, N), -INF, dtype=q.dtype).triu(1)
    return scores.masked_fill(pad.flip(1)[:, None, None], -1e9).softmax(-1) @ v


@attention
def lowest_and_low(q, k, v, pad):
    lowest = torch.finfo(q.dtype).min
    scores = product(q, k) + torch.full((N, N), lowest, dtype=q.dtype).triu(1)
    return scores.masked_fill(pad.flip(1)[:, None, None], -1e9).softmax(-1) @ v


@attention
def low_and_lowest(q, k, v, pad):
    scores = product(q, k) + torch.full((N, N), -1e9, dtype=q.dtype).triu(1)
    hidden = pad.flip(1)[:, None, None]
    return scores.masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1) @ v


@attention
def low_padding_and_causal(q, k, v, pad):
    low = pad.flip(1)[:, None, None].to(q.dtype) * -1e5
    lowest = torch.finfo(q.dtype).min
    return (product(q, k) + low).masked_fill(lower() == 0, lowest).softmax(-1) @ v


@attention
def padding_zeroed(q, k, v, pad):  # ESPnet: such a row is 0
    hidden = pad[:, None, None]
    scores = product(q, k).masked_fill(hidden, torch.finfo(q.dtype).min)
    return scores.softmax(-1).masked_fill(hidden, 0.0) @ v


@attention
def two_fills(q, k, v, pad):
    scores = product(q, k).masked_fill(lower() == 0, -1e9)
    return scores.masked_fill(pad[:, None, None], -1e9).softmax(-1) @ v


@attention
def causal_on_filled(q, k, v, pad):
    lowest = torch.tensor(torch.finfo(q.dtype).min, dtype=q.dtype)
    local = lower().triu(-2).bool()[None, None]
    causal = torch.full((N, N), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    return (torch.where(local, product(q, k), lowest) + causal).softmax(-1) @ v


@attention
def hidden_by_biases_alone(q, k, v, pad):
    lowest = torch.finfo(q.dtype).min
    padding = torch.zeros(2, 1, 1, N, dtype=q.dtype).masked_fill(pad[:, None, None], lowest)
    return (product(q, k) + padding).masked_fill(lower() == 0, -1e9).softmax(-1) @ v


@attention
def scaled_after_the_bias(q, k, v, pad):  # Falcon
    scores = product(q, k) + torch.arange(N) * 0.1
    scores = scores * 0.5 + torch.full((N, N), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    return scores.softmax(-1) @ v


@attention
def bias_first(q, k, v, pad):
    return (torch.arange(N) * 0.1 + product(q, k)).softmax(-1) @ v


@attention
def bias_subtracted_and_causal(q, k, v, pad):
    distance = (torch.arange(N)[None] - torch.arange(N)[:, None]).abs()
    return (product(q, k) - distance).masked_fill(lower() == 0, -INF).softmax(-1) @ v


@attention
def row_bias(q, k, v, pad):  # of queries: -1e300 leaves no scores to tell apart
    low = pad[:, None, :, None].to(q.dtype) * -1e300
    return (product(q, k) + low).softmax(-1) @ v


@attention
def row_bias_of_batches(q, k, v, pad):  # n is a batch here: the attention is local
    low = pad[:, None, :, None].to(q.dtype) * -1e300
    x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    y, low = x.reshape(2 * N, 1, 3, 4), low.transpose(1, 2).reshape(2 * N, 1, 1, 1)
    return (product(y, y) + low).softmax(-1) @ y


@attention
def of_features(q, k, v, pad):  # XCiT: n is what the product sums over
    q = q + F.scaled_dot_product_attention(q, k, v)
    return (product(q.mT, k.mT).softmax(-1) @ v.mT).mT


@attention
def weights_read_twice(q, k, v, pad):
    weights = product(q, k).softmax(-1)
    return weights @ v + weights.mean()


# --- sinks ----------------------------------------------------------------------------------------


def sinks_of(v: Tensor) -> Tensor:
    return v.mean((0, 2, 3))


@attention
def gpt_oss(q, k, v, pad):  # all keys of the second batch are hidden: it sees the sink
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1) | pad[:, None, None]
    mask = torch.zeros(2, 1, N, N, dtype=q.dtype).masked_fill(hidden, torch.finfo(q.dtype).min)
    sinks = sinks_of(v).reshape(1, -1, 1, 1).expand(2, -1, N, -1)
    scores = torch.cat([product(q, k) * 0.5 + mask, sinks], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    weights = F.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1]
    return torch.matmul(F.dropout(weights, 0.0, True), v)


@attention
def sinks_first(q, k, v, pad):
    sinks = sinks_of(v)[:, None, None].expand(2, 3, N, 1)
    scores = product(q, k).masked_fill(pad[:, None, None], -INF)
    return torch.cat((sinks, scores), -1).softmax(-1)[..., 1:] @ v


@attention
def one_more_in_the_divisor(q, k, v, pad):  # "softmax1"
    scores = torch.cat([product(q, k), q.new_zeros(2, 3, N, 1)], -1)
    return scores.softmax(-1)[..., :N] @ v


@attention
def sinks_and_views(q, k, v, pad):
    q, k, v = (x.reshape(6, N, 4) for x in (q, k, v))
    scores = torch.bmm(q, k.mT).view(2, 3, N, N) + torch.arange(N) * 0.1
    sinks = sinks_of(v.view(2, 3, N, 4)).view(1, 3, 1, 1).expand(2, 3, N, 1)
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return torch.bmm(weights.reshape(6, N, N), v)


@attention
def sinks_without_gradient(q, k, v, pad):
    sinks = sinks_of(v).detach().view(1, 3, 1, 1).expand(2, 3, N, 1)
    return torch.cat([product(q, k), sinks], -1).softmax(-1)[..., :-1] @ v


# --- not an attention, or not one that can be done exactly ----------------------------------------


@other
def over_queries(q, k, v, pad):
    return product(q, k).softmax(-2) @ v


@other
def detached(q, k, v, pad):
    return product(q, k).detach().softmax(-1) @ v


@other
def not_so_low(q, k, v, pad):
    return product(q, k).masked_fill(lower() == 0, -100.0).softmax(-1) @ v


@other
def high(q, k, v, pad):
    return product(q, k).masked_fill(lower() == 0, 1e9).softmax(-1) @ v


@other
def low_and_infinite(q, k, v, pad):
    scores = product(q, k).masked_fill(lower() == 0, -INF)
    return scores.masked_fill(pad[:, None, None] & (lower() != 0), -1e9).softmax(-1) @ v


@other
def bias_on_low(q, k, v, pad):
    scores = product(q, k).masked_fill(pad[:, None, None], -1e9)
    return (scores + torch.arange(N) * 0.1).softmax(-1) @ v


@other
def padding_on_low(q, k, v, pad):  # GPT-Neo: of a row that sees no key some scores get gradients
    lowest = torch.finfo(q.dtype).min
    padding = torch.zeros(2, 1, 1, N, dtype=q.dtype).masked_fill(pad.flip(1)[:, None, None], lowest)
    return (product(q, k).masked_fill(lower() == 0, lowest) + padding).softmax(-1) @ v


@other
def lowest_and_lowest(q, k, v, pad):
    lowest = torch.finfo(q.dtype).min
    scores = product(q, k) + torch.full((N, N), lowest, dtype=q.dtype).triu(1)
    return scores.masked_fill(pad.flip(1)[:, None, None], lowest).softmax(-1) @ v


@other
def others_zeroed(q, k, v, pad):
    scores = product(q, k).masked_fill(lower() == 0, -1e9)
    return scores.softmax(-1).masked_fill(pad[:, None, None], 0.0) @ v


@other
def masked_and_zeroed(q, k, v, pad):
    scores = product(q, k) + torch.full((N, N), -INF, dtype=q.dtype).triu(1)
    hidden = pad[:, None, None]
    return scores.masked_fill(hidden, -1e9).softmax(-1).masked_fill(hidden, 0.0) @ v


@other
def low_bias_and_low_fill(q, k, v, pad):
    low = pad.flip(1)[:, None, None].to(q.dtype) * -1e4
    return (product(q, k) + low).masked_fill(lower() == 0, -1e4).softmax(-1) @ v


@other
def narrower_softmax(q, k, v, pad):
    return product(q, k).float().softmax(-1).to(v.dtype) @ v


@other
def softcap_of_a_mask(q, k, v, pad):
    scores = product(q, k) + torch.full((N, N), -1e9, dtype=q.dtype).triu(1)
    return (scores.tanh() * 2).softmax(-1) @ v


@other
def softcap_of_each_head(q, k, v, pad):
    return (product(q, k).tanh() * torch.arange(1, 4)[:, None, None]).softmax(-1) @ v


@other
def memory(q, k, v, pad):  # learned keys, of no batch
    weights = torch.einsum("bhid,jd->bhij", q, k[0, 0]).softmax(-1)
    return torch.einsum("bhij,jd->bhid", weights, v[0, 0])


@other
def scale_of_each_key(q, k, v, pad):
    return (product(q, k) * torch.arange(N)).softmax(-1) @ v


@other
def einsum_of_one_key(q, k, v, pad):  # einsum broadcasts a dim that it sums over
    return torch.einsum("bhij,bhjd->bhid", product(q, k).softmax(-1), v[:, :, :1])


@other
def einsum_of_one_channel(q, k, v, pad):
    weights = torch.einsum("bhid,bhjd->bhij", q, k[..., :1]).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


@other
def mask_of_other_heads(q, k, v, pad):  # as (3, 2) it is broadcast, and (2, 3) has no dim for it
    scores = product(q, k).view(3, 2, N, N)
    scores = scores.masked_fill(pad[0].expand(3, 1, 1, N), -1e9)
    return scores.view(2, 3, N, N).softmax(-1) @ v


@other
def low_beyond_half(q, k, v, pad):
    q, k, v = q.half(), k.half(), v.half()
    scores = (product(q, k) + q.mean()).float().masked_fill(pad[:, None, None], -1e9)
    return scores.softmax(-1).half() @ v


@other
def factor_in_float32(q, k, v, pad):
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    scores = product(q, k).float() * torch.full((3, 1, 1), 0.5)
    return scores.softmax(-1).bfloat16() @ v


@other
def sink_of_each_row(q, k, v, pad):
    scores = torch.cat([product(q, k), v[..., :1]], -1)
    return scores.softmax(-1)[..., :-1] @ v


@other
def sink_of_another_scale(q, k, v, pad):
    scores, sinks = product(q, k), sinks_of(v).view(1, 3, 1, 1).expand(2, 3, N, 1)
    scores = scores - scores.amax(-1, keepdim=True)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


@other
def two_columns_left_out(q, k, v, pad):
    scores = torch.cat([product(q, k), v[..., :2]], -1)
    return scores.softmax(-1)[..., :-2] @ v


@other
def last_key_left_out(q, k, v, pad):
    return product(q, k).softmax(-1)[..., :-1] @ v[..., :-1, :]


@other
def divided_by_zero(q, k, v, pad):
    return (product(q, k) / 0.0).softmax(-1) @ v
