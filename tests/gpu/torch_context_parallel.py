"""torch's own context parallel (2.11 to 2.13), as its users call it: to be measured beside.

``context_parallel`` patches ``F.scaled_dot_product_attention`` for causal masks; other masks go
through flex, whose keys and values it gathers. It is a prototype: its names are private, and said
here only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import _attention as cp
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _load_balancer as balancers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

KERNELS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
Measure = Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Any]


@dataclass(frozen=True)
class Mode:
    """``way``: how keys come, or how queries are dealt out for flex."""

    kernel: str
    way: str

    def __str__(self) -> str:
        return f"torch context_parallel, {self.kernel}, {self.way}"


CAUSAL = tuple(Mode(kernel, way) for kernel in KERNELS for way in ("allgather", "alltoall"))


def modes(documents: int, window: int) -> tuple[Mode, ...]:
    if documents:
        return (Mode("flex", "balanced by document"),)
    return (Mode("flex", "even"),) if window else CAUSAL


@contextmanager
def rotating(way: str, mesh: DeviceMesh, buffers: Sequence[Tensor], dim: int) -> Iterator[None]:
    """Inside, ``buffers`` are this rank's parts along ``dim``. torch 2.11 leaves the patched
    function behind after an error: that is taken out here, and raised again."""
    cp.set_rotate_method(way)
    cp._cp_options.enable_load_balance = True
    failure: BaseException | None = None
    with context_parallel(mesh, buffers=[*buffers], buffer_seq_dims=[dim] * len(buffers)):
        try:
            yield
        except Exception as error:
            failure = error
    if failure is not None:
        raise failure


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def sdpa(tensors: tuple[Tensor, ...], mode: Mode, mesh: DeviceMesh, measure: Measure) -> Any:
    """Of whole q, k, v and dout, causal."""
    with rotating(mode.way, mesh, tensors, 2), sdpa_kernel(KERNELS[mode.kernel]):
        return measure(causal, tuple(x.clone() for x in tensors))


class Flex(nn.Module):
    """Where torch gathers the keys and values, before it."""

    def __init__(self, blocks: Any):
        super().__init__()
        self.blocks, self.call = blocks, torch.compile(flex_attention, dynamic=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.call(query, key, value, block_mask=self.blocks, enable_gqa=True)


def flex(
    tensors: tuple[Tensor, ...],
    mask_mod: Callable[..., Tensor],
    documents: int,
    mesh: DeviceMesh,
    measure: Measure,
) -> Any:
    """Of whole q, k, v and dout; ``documents``: of one length, which are balanced each."""
    n, device, balancer = tensors[0].shape[2], tensors[0].device, None
    if documents:
        lengths = [[n // documents] * documents]
        balancer = balancers._PerDocumentHeadTailLoadBalancer(lengths, mesh.size(), device)
    blocks = torch.compile(create_block_mask)(mask_mod, 1, 1, n, n, device=device)
    *parts, mine = cp._context_parallel_shard(mesh, [*tensors, blocks], [2] * 5, balancer)
    style = cp._ContextParallel(2, cp._ContextParallel.AttentionType.FLEX)
    return measure(style._apply(Flex(mine), mesh), tuple(x.contiguous() for x in parts))
