"""BlockMasks whose lists of blocks say something else than their mask_mod are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import mosaic
from mosaic.frontend import block_masks

N, BLOCK = 50, 16
WRONG = "lists of blocks say something else than its mask_mod"


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def made(mod=causal, n: int = N, **given) -> BlockMask:
    return create_block_mask(mod, None, None, n, n, device="cpu", BLOCK_SIZE=BLOCK, **given)


def compiled(mask_of=lambda mask, n: mask):
    @torch.compile(backend="mosaic", options={"inner": "eager"})
    def attend(x: Tensor, mask: BlockMask) -> Tensor:
        return flex_attention(x, x, x, block_mask=mask_of(mask, x.shape[2]))

    return attend


def only(**changes) -> BlockMask:
    """The causal mask, with other lists."""
    kept = made()
    names = "kv_num_blocks kv_indices full_kv_num_blocks full_kv_indices".split()
    lists = {name: changes.get(name, getattr(kept, name)) for name in names}
    return BlockMask.from_kv_blocks(**lists, BLOCK_SIZE=BLOCK, mask_mod=causal, seq_lengths=(N, N))


def test_lists_that_hide_what_the_mask_shows() -> None:
    counts = made().full_kv_num_blocks.clone()
    counts[..., 2] -= 1
    x = torch.randn(1, 2, N, 8)
    with pytest.raises(mosaic.UnsupportedError, match=WRONG) as error:
        compiled()(x, only(full_kv_num_blocks=counts))
    assert "queries from 32 on, keys from 16 on, of batch 0, head 0" in str(error.value)
    assert "test_block_masks.py" in str(error.value)


def test_lists_that_show_what_the_mask_hides() -> None:
    """A block on the diagonal that is called full."""
    mask = made()
    counts, indices = mask.full_kv_num_blocks + 1, mask.full_kv_indices.clone()
    indices.scatter_(-1, mask.full_kv_num_blocks[..., None].long(), mask.kv_indices[..., :1])
    lists = {"full_kv_num_blocks": counts, "full_kv_indices": indices}
    with pytest.raises(mosaic.UnsupportedError, match=WRONG):
        compiled()(torch.randn(1, 2, N, 8), only(**lists, kv_num_blocks=0 * mask.kv_num_blocks))


def test_right_lists_of_the_users_own() -> None:
    """Blocks that are all looked at in part; and without a list of full ones."""
    x = torch.randn(1, 2, N, 8)
    want = flex_attention(x, x, x, block_mask=made())
    torch.testing.assert_close(compiled()(x, made(separate_full_blocks=False)), want)
    torch.testing.assert_close(compiled()(x, made()), want)


def test_layers_that_are_alike_compare_once(monkeypatch) -> None:
    looked = []
    monkeypatch.setattr(block_masks, "state_of", spied(block_masks.state_of, looked))
    ids, x, layers = torch.arange(N) // 20, torch.randn(1, 2, N, 8), [compiled(), compiled()]
    for count in (1, 2):
        mask = made(lambda b, h, i, j: ids[i] == ids[j])
        for _ in range(2):
            for layer in layers:
                layer(x, mask)
        assert len(looked) == count


def spied(run, looked: list):
    def look(lists):
        looked.append(lists)
        return run(lists)

    return look


def test_documents_that_are_written_to_afterwards() -> None:
    ids = torch.arange(N) // 20
    mask = made(lambda b, h, i, j: ids[i] == ids[j])
    x, attend = torch.randn(1, 2, N, 8), compiled()
    attend(x, mask)
    attend(x, mask)
    ids.copy_(ids.flip(0).clone())
    with pytest.raises(mosaic.UnsupportedError, match=WRONG):
        attend(x, mask)


def test_lists_computed_in_the_program() -> None:
    """By create_block_mask of another mask."""

    def other(mask: BlockMask, n: int) -> BlockMask:
        found = made(lambda b, h, i, j: i >= j + 20)
        found.mask_mod = causal
        return found

    with pytest.raises(Exception, match=WRONG):
        compiled(other)(torch.randn(1, 2, N, 8), made())


class Long(nn.Module):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        mod = lambda b, h, i, j: (i >= j) & (ids[b, i] == ids[b, j])  # noqa: E731
        n = x.shape[2]
        mask = create_block_mask(mod, len(x), None, n, n, device="cpu")
        return flex_attention(x, x, x, block_mask=mask)


def test_made_of_its_mask_mod_in_the_program() -> None:
    """Nothing is compared, and nothing of the lists is left: they take pairs of 8,192 tokens."""
    x, ids = torch.randn(2, 2, 8192, 8), torch.zeros(2, 8192, dtype=torch.long)
    plan = mosaic.explain(Long(), x, ids, sp_size=4)
    assert [a.mask for a in plan.attentions] == ["causal, documents"]
