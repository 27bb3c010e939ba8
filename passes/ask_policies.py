"""Ask the policy of a selective checkpoint which results of its region are kept for backward.

    %mm = aten.mm(%x, %w)   recompute: PREFER_RECOMPUTE   ->   recompute: MUST_SAVE

``checkpoint(f, x, context_fn=partial(create_selective_checkpoint_contexts, policy))`` is marked in
capture as any other region is. The policy names ATen's ops as they are below autograd, so it is
asked here, in the order of the program, as in eager mode. Attention that sends, and every
collective, is kept whatever the policy says: they carry no mark.
"""

from __future__ import annotations

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from mosaic.partition.context import Context
from mosaic.torch_private import POLICIES_IGNORE, is_in_backward


def ask_policies(graph: fx.Graph, context: Context) -> int:
    policies = context.policies
    asked = [
        node
        for node in graph.nodes
        if "recompute" in node.meta
        and node.meta.get("ac_graph_id") in policies
        and node.target not in POLICIES_IGNORE
        and not is_in_backward(node)
    ]
    for node in asked:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        about = SelectiveCheckpointContext(is_recompute=False)
        about.op_output = node.meta.get("val")
        answer = policies[node.meta["ac_graph_id"]](about, node.target, *args, **kwargs)
        if isinstance(answer, bool):
            answer = CheckpointPolicy.MUST_SAVE if answer else CheckpointPolicy.PREFER_RECOMPUTE
        node.meta["recompute"] = answer
    return len(asked)
