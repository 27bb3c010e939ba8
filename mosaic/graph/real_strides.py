"""A graph that is run node by node must heed the strides that come, not those that were traced.

Some ops give other strides than torch's description of them says (``huber_loss_backward``, and on
GPUs einsums). A ``view`` then fails, a collective refuses what is not contiguous, and a kernel that
was chosen for the traced strides may read memory wrongly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def cpu_flash(*args: Any, **kwargs: Any) -> Any:
    """The op, which takes head dims to lie side by side."""
    return FLASH(*map(in_rows, args), **kwargs)


def cpu_flash_backward(*args: Any, **kwargs: Any) -> Any:
    """Its backward."""
    return FLASH_BACKWARD(*map(in_rows, args), **kwargs)


def in_rows(x: Any) -> Any:
    is_block = isinstance(x, Tensor) and x.ndim == 4 and x.stride(-1) != 1
    return x.contiguous() if is_block else x


def contiguous_first(collective: Any) -> Any:
    """The collective of its input in order of memory."""

    def sent(x: Tensor, *args: Any) -> Tensor:
        return collective(x.contiguous(), *args)

    return sent


HEEDFUL = {
    aten.view.default: aten.reshape.default,
    FLASH: cpu_flash,
    FLASH_BACKWARD: cpu_flash_backward,
    **{
        op: contiguous_first(op)
        for op in (
            c10d.all_gather_into_tensor.default,
            c10d.all_to_all_single.default,
            c10d.reduce_scatter_tensor.default,
        )
    },
}


def heeding_strides(graph: fx.Graph) -> fx.Graph:
    """The graph to be run: views copy where they must, and kernels look."""
    run = fx.Graph()
    run.output(run.graph_copy(graph, {}))
    for node in run.nodes:
        node.target = HEEDFUL.get(node.target, node.target)
    return run
