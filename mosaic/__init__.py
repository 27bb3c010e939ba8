"""Mosaic: a model written for one device, run on p with its attended axis cut into p parts."""

from mosaic.decorator import shard
from mosaic.errors import MosaicError, ShardingError, UnsupportedError
from mosaic.explain import explain
from mosaic.layout import Layout
from mosaic.mesh import MosaicContext, get_context, init
from mosaic.methods import (
    AllGather,
    Auto,
    Composed,
    Hierarchical,
    Local,
    Mesh2D,
    Method,
    Ring,
    Ulysses,
)
from mosaic.plan import Plan
from mosaic.spec import ShardingSpec
from mosaic.tensors import gather, layout_of, shard_like, shard_tensor

__all__ = [
    "AllGather",
    "Auto",
    "Composed",
    "Hierarchical",
    "Layout",
    "Local",
    "Mesh2D",
    "Method",
    "MosaicContext",
    "MosaicError",
    "Plan",
    "Ring",
    "ShardingError",
    "ShardingSpec",
    "Ulysses",
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
