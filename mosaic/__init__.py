"""Mosaic: a model written for one device, run on p with its attended axis cut into p parts."""

from mosaic.errors import MosaicError, ShardingError, UnsupportedError
from mosaic.mesh import MosaicContext, get_context, init
from mosaic.spec import ShardingSpec

__all__ = [
    "MosaicContext",
    "MosaicError",
    "ShardingError",
    "ShardingSpec",
    "UnsupportedError",
    "get_context",
    "init",
]
__version__ = "0.1.0"
