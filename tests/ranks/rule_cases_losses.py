"""Losses: every reduction, every form of target."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rule_case import Cases, constant, f, i, unit

from mosaic.losses.op import TOKEN_LOSSES

CASES = Cases()
add = CASES.add

for name, loss in {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
}.items():
    for reduction in ("none", "mean", "sum"):
        add(
            f"{name} {reduction}",
            lambda x, y, fn=loss, r=reduction: fn(x, y, reduction=r),
            f(5, 2),
            f(5, 2),
        )
add("bce logits", F.binary_cross_entropy_with_logits, f(5, 2), unit(5, 2))
add(
    "bce logits weight",
    lambda x, y, w: F.binary_cross_entropy_with_logits(x, y, w, pos_weight=w),
    f(5, 2),
    unit(5, 2),
    constant(2),
)
add("bce", F.binary_cross_entropy, unit(5, 2), unit(5, 2))
add("nll", lambda x, y: F.nll_loss(x.log_softmax(-1), y), f(5, 4), i(4, 5))
add(
    "kl_div",
    lambda x, y: F.kl_div(x.log_softmax(-1), y, reduction="batchmean"),
    f(5, 4),
    unit(5, 4),
)
add("hinge", lambda x, y: F.hinge_embedding_loss(x, y), f(5, 2), constant(5, 2))
for reduction in ("none", "mean", "sum"):
    add(
        f"cross_entropy {reduction}",
        lambda x, y, r=reduction: F.cross_entropy(x, y, reduction=r),
        f(7, 4),
        i(4, 7),
    )
    add(
        f"cross_entropy nd {reduction}",
        lambda x, y, r=reduction: F.cross_entropy(x, y, reduction=r),
        f(2, 4, 5),
        i(4, 2, 5),
    )
    add(
        f"cross_entropy weights {reduction}",
        lambda x, y, w, r=reduction: F.cross_entropy(x, y, w, reduction=r, ignore_index=2),
        f(7, 4),
        i(4, 7),
        constant(4),
    )
    add(
        f"cross_entropy smooth {reduction}",
        lambda x, y, w, r=reduction: F.cross_entropy(
            x, y, w, reduction=r, label_smoothing=0.2, ignore_index=1
        ),
        f(7, 4),
        i(4, 7),
        constant(4),
    )
    add(
        f"cross_entropy probabilities {reduction}",
        lambda x, y, r=reduction: F.cross_entropy(x, y.softmax(-1), reduction=r),
        f(7, 4),
        f(7, 4),
    )
    add(
        f"cross_entropy probabilities nd {reduction}",
        lambda x, y, w, r=reduction: F.cross_entropy(
            x, y.softmax(1), w, label_smoothing=0.1, reduction=r
        ),
        f(2, 4, 5),
        f(2, 4, 5),
        constant(4),
    )
    add(
        f"cross_entropy vector {reduction}",
        lambda x, y, r=reduction: F.cross_entropy(x, y, reduction=r),
        f(5),
        i(5),
    )
add(
    "cross_entropy vector probabilities", lambda x, y: F.cross_entropy(x, y.softmax(-1)), f(5), f(5)
)
add(
    "cross_entropy ignored on some rank",
    lambda x, y: F.cross_entropy(x, torch.where(torch.arange(7) < 4, -100, y)),
    f(7, 4),
    i(4, 7),
)
add("cross_entropy all ignored", lambda x, y: F.cross_entropy(x, y * 0 - 100), f(7, 4), i(4, 7))
add("cross_entropy shifted", lambda x, y: F.cross_entropy(x[:-1], y[1:]), f(7, 4), i(4, 7))
add(
    "cross_entropy shifted batch",
    lambda x, y: F.cross_entropy(x[:, :-1].reshape(-1, 4), y[:, 1:].reshape(-1)),
    f(2, 7, 4),
    i(4, 2, 7),
)
add(
    "cross_entropy smooth all ignored",
    lambda x, y: F.cross_entropy(x, y * 0 - 100, label_smoothing=0.1),
    f(7, 4),
    i(4, 7),
)
add(
    "cross_entropy 5d",
    lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
    f(2, 4, 5, 2),
    i(4, 2, 5, 2),
)


def token_losses(hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return TOKEN_LOSSES(hidden, head, None, target, None, "tanh; mul 2.0", 1, 0.1)[0]


add("token_losses", token_losses, f(7, 3), f(4, 3), i(4, 7))
add(
    "token_losses of a batch",
    lambda x, head, y: token_losses(x.reshape(-1, 3), head, y.reshape(-1)).sum(),
    f(2, 7, 3),
    f(4, 3),
    i(4, 2, 7),
)
