"""Why a mask is made for every query and key, and not computed by a kernel pair by pair."""

from __future__ import annotations

from mosaic.attention.kernels.flex import refused
from mosaic.attention.kernels.kernel import STRUCTURE, Case

#: By the last words of a mask: what is no structure.
TENSORS = {
    "dense boolean": "it is an input, or made in a way that is not read",
    "dense float": "it is added to the scores",
    "bias of keys": "it is added to the scores",
}


def why_dense(mask: str, case: Case) -> str:
    """``mask``: in words, as plans print it. "" where a kernel computes it."""
    rest = mask.rpartition(", ")[2]
    return TENSORS.get(rest) or refused(case._replace(mask=STRUCTURE))
