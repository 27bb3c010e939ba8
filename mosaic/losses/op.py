"""The op that stands for a head and its cross-entropy in a graph.

It is opaque to AOTAutograd and to the inner compiler, with a backward of its own: a partitioner
would keep logits, and a compiler would see the same few ops once for each block. The products run
as they are, what is between them is one kernel (``blocks.py``).
"""

from __future__ import annotations

import torch

from mosaic.losses.blocks import How, Rows, Wanted, backward, dtype_of, forward


@torch.library.custom_op(
    "mosaic::token_losses",
    mutates_args=(),
    schema="(Tensor hidden, Tensor head, Tensor? bias, Tensor target, Tensor? weight, str steps, "
    "int ignored, float smoothing) -> (Tensor, Tensor)",
)
def token_losses(hidden, head, bias, target, weight, steps, ignored, smoothing):
    """The cross-entropy of each token, of its hidden state and the head.

    hidden (tokens, dim), head (classes, dim), bias (classes), target (tokens) int64, weight
    (classes). ``steps``: what is done to logits before their softmax (``steps.py``); ``ignored``: a
    target without a loss; ``smoothing``: of labels. Gives losses (tokens) and the log-sum-exp of
    logits (tokens), in float32 or float64.
    """
    how = How(steps, ignored, smoothing)
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(hidden, head, bias, target, weight, how)


@token_losses.register_fake
def _(hidden, head, bias, target, weight, steps, ignored, smoothing):
    dtype = dtype_of(hidden, How(steps, ignored, smoothing))
    return tuple(target.new_empty(target.shape, dtype=dtype) for _ in range(2))


@torch.library.custom_op(
    "mosaic::token_losses_backward",
    mutates_args=(),
    schema="(Tensor dlosses, Tensor hidden, Tensor head, Tensor? bias, Tensor target, "
    "Tensor? weight, Tensor lse, str steps, int ignored, float smoothing, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
)
def token_losses_backward(
    dlosses, hidden, head, bias, target, weight, lse, steps, ignored, smoothing, wanted
):
    """The gradients of hidden, head and bias: without an element where one is not wanted."""
    rows, how = Rows(target, lse, dlosses), How(steps, ignored, smoothing)
    with torch.autocast(hidden.device.type, enabled=False):
        return backward(hidden, head, bias, rows, weight, how, Wanted(*wanted))


@token_losses_backward.register_fake
def _(dlosses, hidden, head, bias, target, weight, lse, steps, ignored, smoothing, wanted):
    is_hidden, is_head, is_bias = wanted
    return (
        hidden.new_empty(hidden.shape if is_hidden else [0]),
        head.new_empty(head.shape if is_head else [0]),
        head.new_empty(head.shape[:1] if is_bias else [0]),
    )


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.steps, ctx.ignored, ctx.smoothing = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, dlosses, dlse):
    if dlosses is None:
        return (None,) * 8
    wanted = list(ctx.needs_input_grad[:3])
    how = (ctx.steps, ctx.ignored, ctx.smoothing)
    grads = torch.ops.mosaic.token_losses_backward(dlosses, *ctx.saved_tensors, *how, wanted)
    grads = (grad if asked else None for grad, asked in zip(grads, wanted, strict=True))
    return (*grads, *[None] * 5)


token_losses.register_autograd(_backward, setup_context=_setup)
TOKEN_LOSSES = torch.ops.mosaic.token_losses.default
