"""The op that stands for a call of a recurrence in a graph.

In the global graph nothing but the call is known, and ``partition`` writes it out again: functions
of plain torch become ops that the inner compiler sees, as they would be without us. The op itself
runs where a function cannot be looked into (kernels of a package): forward keeps its inputs alone,
and backward runs the function once more, with its own autograd.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from mosaic.recurrences.call import Recurrence, is_of_package
from mosaic.torch_private import recording


@torch.library.custom_op(
    "mosaic::recurrence",
    mutates_args=(),
    schema="(Tensor[] tensors, str call) -> (Tensor, Tensor)",
)
def recurrence(tensors, call):
    """What the call gives, and its last state."""
    known = Recurrence.decode(call)
    out, last = known.run(**known.given(tensors))
    return out.contiguous(), last.contiguous()


@recurrence.register_fake
def _(tensors, call):
    """A row's result, as long as the rows are: a loop over all of them takes its time. Kernels of a
    package need memory, and give what they are given; sizes are those of what is written."""
    known = Recurrence.decode(call)
    given, kind = known.given(tensors), known.kind
    rows = {name: dim for name, dim in kind.rows.items() if given.get(name) is not None}
    count = next(given[name].shape[dim] for name, dim in rows.items())
    one = {name: given[name].new_empty(one_row(given[name], dim)) for name, dim in rows.items()}
    out, last = known.called(inspect.unwrap(known.function), {**given, **one})
    shape = [count if d == kind.out else n for d, n in enumerate(out.shape)]
    dtype = tensors[0].dtype if is_of_package(known.function) else out.dtype
    return out.new_empty(shape, dtype=dtype), last.new_empty(last.shape)


def one_row(x: Tensor, dim: int) -> list[int]:
    return [1 if d == dim else n for d, n in enumerate(x.shape)]


@torch.library.custom_op(
    "mosaic::recurrence_backward",
    mutates_args=(),
    schema="(Tensor? dout, Tensor? dlast, Tensor[] tensors, str call, bool[] wanted) -> Tensor[]",
)
def recurrence_backward(dout, dlast, tensors, call, wanted):
    """The gradients of the tensors that are ``wanted``: without an element of others."""
    known = Recurrence.decode(call)
    with recording():
        leaves = [x.detach().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
        results = known.run(**known.given(leaves))
        pairs = [(x, dx) for x, dx in zip(results, (dout, dlast), strict=True) if dx is not None]
        outs, douts = zip(*pairs, strict=True)
        learned = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(outs, learned, douts, allow_unused=True))
    return [gradient(next(found) if w else None, x, w) for x, w in zip(leaves, wanted, strict=True)]


def gradient(found: Tensor | None, x: Tensor, is_wanted: bool) -> Tensor:
    if not is_wanted:
        return x.new_empty(0)
    return torch.zeros_like(x, requires_grad=False) if found is None else found.contiguous()


@recurrence_backward.register_fake
def _(dout, dlast, tensors, call, wanted):
    return [x.new_empty(x.shape if w else [0]) for x, w in zip(tensors, wanted, strict=True)]


def _setup(ctx, inputs, output) -> None:
    tensors, ctx.call = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout, dlast):
    tensors = list(ctx.saved_tensors)
    if dout is None and dlast is None:
        return [None] * len(tensors), None
    wanted = list(ctx.needs_input_grad[0])
    grads = torch.ops.mosaic.recurrence_backward(dout, dlast, tensors, ctx.call, wanted)
    return [grad if w else None for grad, w in zip(grads, wanted, strict=True)], None


recurrence.register_autograd(_backward, setup_context=_setup)
RECURRENCE = torch.ops.mosaic.recurrence.default
