"""Mosaic: a model written for one device, run on p with its attended axis cut into p parts."""

from mosaic.api.errors import MosaicError, ShardingError, UnsupportedError
from mosaic.api.methods import (
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
from mosaic.api.spec import ShardingSpec
from mosaic.eager.functional import attention
from mosaic.eager.modules import (
    ComposedAttention,
    CrossAxisAttention,
    HierarchicalAttention,
    MultiAxisAttention,
    MultiAxisAttention2D,
)
from mosaic.eager.projections import sum_gradients
from mosaic.eager.tensors import gather, shard_tensor
from mosaic.frontend import eagerly as _eagerly  # noqa: F401 (ops on a ShardedTensor)
from mosaic.frontend.decorator import shard
from mosaic.frontend.explain import explain
from mosaic.frontend.parallelize import parallelize
from mosaic.layout import Layout
from mosaic.report.plan import Plan, plans
from mosaic.runtime.mesh import MosaicContext, get_context, init
from mosaic.runtime.sharded_tensor import ShardedTensor, distribute

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
    "ShardedTensor",
    "ShardingError",
    "ShardingSpec",
    "Ulysses",
    "UnsupportedError",
    "attention",
    "distribute",
    "explain",
    "gather",
    "get_context",
    "init",
    "parallelize",
    "plans",
    "shard",
    "shard_tensor",
    "sum_gradients",
]
__version__ = "0.1.0"
