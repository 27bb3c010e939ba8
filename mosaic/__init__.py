"""Mosaic: a model written for one device, run on p with its attended axis cut into p parts."""

from mosaic.decorator import shard
from mosaic.errors import MosaicError, ShardingError, UnsupportedError
from mosaic.explain import explain
from mosaic.functional import attention
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
from mosaic.modules import (
    ComposedAttention,
    CrossAxisAttention,
    HierarchicalAttention,
    MultiAxisAttention,
    MultiAxisAttention2D,
)
from mosaic.plan import Plan
from mosaic.projections import sum_gradients
from mosaic.spec import ShardingSpec
from mosaic.tensors import as_shard, gather, layout_of, shard_like, shard_tensor

__all__ = [
    "AllGather",
    "Auto",
    "Composed",
    "ComposedAttention",
    "CrossAxisAttention",
    "Hierarchical",
    "HierarchicalAttention",
    "Layout",
    "Local",
    "Mesh2D",
    "Method",
    "MosaicContext",
    "MosaicError",
    "MultiAxisAttention",
    "MultiAxisAttention2D",
    "Plan",
    "Ring",
    "ShardingError",
    "ShardingSpec",
    "Ulysses",
    "UnsupportedError",
    "as_shard",
    "attention",
    "explain",
    "gather",
    "get_context",
    "init",
    "layout_of",
    "shard",
    "shard_like",
    "shard_tensor",
    "sum_gradients",
]
__version__ = "0.1.0"
