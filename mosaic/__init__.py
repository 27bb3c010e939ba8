"""Mosaic: a model written for one device, run on p with its attended axis cut into p parts."""

from mosaic.decorator import shard
from mosaic.errors import MosaicError, ShardingError, UnsupportedError
from mosaic.explain import explain
from mosaic.layout import Layout
from mosaic.mesh import MosaicContext, get_context, init
from mosaic.plan import Plan
from mosaic.spec import ShardingSpec
from mosaic.tensors import gather, layout_of, shard_like, shard_tensor

__all__ = [
    "Layout",
    "MosaicContext",
    "MosaicError",
    "Plan",
    "ShardingError",
    "ShardingSpec",
    "UnsupportedError",
    "explain",
    "gather",
    "get_context",
    "init",
    "layout_of",
    "shard",
    "shard_like",
    "shard_tensor",
]
__version__ = "0.1.0"
