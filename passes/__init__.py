"""The order of the passes. A pass is ``name(graph, context) -> int``: how many rewrites it made."""

if __name__ != "mosaic.passes":
    raise ImportError("import mosaic.passes: the folder passes/ is shipped under that name")

from mosaic.passes.analyze_masks import analyze_masks
from mosaic.passes.ask_policies import ask_policies
from mosaic.passes.assign_layouts import assign_layouts
from mosaic.passes.choose_method import choose_method
from mosaic.passes.defer_outputs import defer_outputs
from mosaic.passes.infer_axes import infer_axes
from mosaic.passes.keep_results import keep_results
from mosaic.passes.localize_dtensors import localize_dtensors
from mosaic.passes.lower_attention import lower_attention
from mosaic.passes.lower_collectives import lower_collectives
from mosaic.passes.mask_padding import mask_padding
from mosaic.passes.normalize import normalize
from mosaic.passes.overlap import overlap
from mosaic.passes.partition import partition
from mosaic.passes.pin_collectives import pin_collectives
from mosaic.passes.propagate import propagate
from mosaic.passes.raise_attention import raise_attention
from mosaic.passes.raise_loss import raise_loss
from mosaic.passes.rewrite_attention import rewrite_attention

#: On the global graph, before AOTAutograd.
PIPELINE = (
    mask_padding,  # of lengths that share a program
    normalize,
    localize_dtensors,  # tensor parallelism: the program of one rank of its axis
    raise_attention,  # from here on every attention is one node
    analyze_masks,  # what attention masks mean; most of them disappear
    raise_loss,  # a head with its cross-entropy: no logits
    defer_outputs,  # masks that only other graphs read
    infer_axes,  # which axis, and where it begins
    propagate,  # where it is in every tensor
    assign_layouts,  # who holds which indices; places follow
    choose_method,
    partition,  # the only pass that sees the rank
    rewrite_attention,
)

#: Programs are right without these, only slower or larger: ``MOSAIC_OFF=overlap,analyze_masks``
#: leaves these two out, to find a pass that goes wrong.
OPTIONAL = (raise_attention, analyze_masks, raise_loss, defer_outputs, overlap)

#: On the joint graph, before AOTAutograd's partitioner cuts it into forward and backward.
JOINT = (ask_policies, keep_results, pin_collectives)

#: On the forward and on the backward graph, after AOTAutograd's partitioner.
LOWERING = (
    lower_collectives,
    lower_attention,
    overlap,  # after every collective is explicit
)
