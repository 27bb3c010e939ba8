"""Tensors that are made when they are read, of one process."""

from __future__ import annotations

import torch

from mosaic.frontend.deferred import pattern
from mosaic.runtime.deferred_tensor import DeferredTensor


def test_shifted_labels_are_flattened() -> None:
    """``labels[:, 1:].flatten()``: the deferred slice is contiguous, and the one that is made is
    not. A batch of several rows failed."""
    labels = torch.arange(26).view(2, 13)
    shifted = pattern(labels)[:, 1:]
    for late in (shifted.flatten(), shifted.reshape(4, 6), shifted.view(24)):
        assert isinstance(late, DeferredTensor)
        assert torch.equal(late.full_tensor(), labels[:, 1:].reshape(late.shape))
