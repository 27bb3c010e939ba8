"""Why a mask is made for every query and key, and not computed by a kernel pair by pair."""

from __future__ import annotations

from mosaic.attention.blocks import Band
from mosaic.attention.kernels.flex import refused
from mosaic.attention.kernels.kernel import STRUCTURE, Case
from mosaic.attention.kernels.tiled import TILES

#: By the last words of a mask: what is no structure.
TENSORS = {
    "dense boolean": "it is an input, or made in a way that is not read",
    "dense float": "it is added to the scores",
    "bias of keys": "it is added to the scores",
}


def is_more(mask: str, band: Band) -> bool:
    """Whether a mask in words, as plans print it, says more than its band, beside sinks."""
    return mask.removeprefix("sinks").removeprefix(", ") not in ("", str(band))


def why_dense(mask: str, case: Case) -> str:
    """``mask``: in words. "" where a kernel computes it."""
    rest = mask.rpartition(", ")[2]
    case = case._replace(mask=STRUCTURE)
    return TENSORS.get(rest) or ("" if TILES.fits(case) else refused(case))
