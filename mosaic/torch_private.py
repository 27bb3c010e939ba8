"""Every private torch name that Mosaic uses, in one place (seen in torch 2.11, 2.13, 2.14)."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from traceback import FrameSummary
from types import CodeType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, overrides
from torch._C import DisableTorchFunctionSubclass as without_torch_function
from torch._C import _functorch as functorch
from torch._C import _set_grad_enabled as set_grad_enabled
from torch._decomp import decomposition_table
from torch._dynamo import config as dynamo_config
from torch._dynamo import eval_frame, external_utils
from torch._dynamo import reset as reset_dynamo
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.convert_frame import CatchErrorsWrapper
from torch._dynamo.eval_frame import reset_code
from torch._dynamo.exc import TensorifyScalarRestartAnalysis as Restart
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX as RESUMED
from torch._dynamo.symbolic_convert import TensorifyState
from torch._dynamo.symbolic_convert import tls as dynamo_thread
from torch._functorch import config as functorch_config
from torch._functorch import partitioners
from torch._functorch.aot_autograd import aot_export_module, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._functorch.predispatch import _add_batch_dim, _remove_batch_dim
from torch._functorch.predispatch import _vmap_decrement_nesting as VMAP_ENDS
from torch._functorch.predispatch import _vmap_increment_nesting as VMAP_BEGINS
from torch._functorch.predispatch import lazy_load_decompositions as VMAP_PREPARES
from torch._guards import CompileContext, tracing
from torch._higher_order_ops.flex_attention import flex_attention as flex_op
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._higher_order_ops.wrap import wrap as wrap_body
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._library.simple_registry import singleton as library_registry
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast
from torch.autograd import _force_original_view_tracking
from torch.distributed import get_process_group_ranks
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store as default_store
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from torch.fx.experimental.proxy_tensor import make_fx, snapshot_fake
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.graph import _Namespace
from torch.fx.traceback import preserve_node_meta
from torch.nn.attention.flex_attention import (
    BlockMask,
    _convert_mask_to_block_mask,
    _dense_to_ordered,
)
from torch.nn.attention.flex_attention import _vmap_for_bhqkv as flex_vmap
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    autograd_would_have_decomposed,
    is_traceable_wrapper_subclass,
)
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils.checkpoint import SAC_IGNORED_OPS as POLICIES_IGNORE
from torch.utils.checkpoint import CheckpointPolicy

from mosaic.api.errors import UnsupportedError

from torch._functorch.autograd_function import autograd_function_apply  # isort: skip
from torch._higher_order_ops.flex_attention import create_fw_bw_graph  # isort: skip

__all__ = [
    "DATA_DEPENDENT",
    "INLINED",
    "POLICIES_IGNORE",
    "RESUMED",
    "VMAP_BEGINS",
    "VMAP_ENDS",
    "VMAP_PARTS",
    "VMAP_PREPARES",
    "FakeStore",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "HigherOrderOperator",
    "Restart",
    "TorchDispatchMode",
    "aot_export_module",
    "autograd_function_apply",
    "autograd_would_have_decomposed",
    "averages",
    "bake_floats",
    "break_after",
    "call_of_dtensor",
    "code_at_hand",
    "compile_by_eager",
    "compile_by_inductor",
    "compile_with_hooks",
    "compiled_by_inductor",
    "compiles_left",
    "decompose_op",
    "decompositions_for_inductor",
    "default_store",
    "encoder_layer_op",
    "enter_autocast",
    "exit_autocast",
    "fake_mode_of",
    "flattened",
    "flex_backward",
    "flex_blocks",
    "flex_forward",
    "flex_op",
    "flex_op_of_subclasses",
    "flex_vmap",
    "functorch_restored",
    "get_data",
    "has_contexts",
    "has_decomposition",
    "is_alias",
    "is_composite",
    "is_in_backward",
    "is_linear",
    "is_mesh",
    "is_of_functorch",
    "is_traceable_wrapper_subclass",
    "is_whole_function",
    "lists_of_blocks",
    "make_fx",
    "mark_changing",
    "multi_head_attention_op",
    "never_compiles",
    "no_dispatch",
    "no_tracing_context",
    "one_graph_under_ddp",
    "placeholder_source",
    "policy_of",
    "preserve_node_meta",
    "pytree",
    "recompute_marks",
    "recording",
    "rename_afresh",
    "reset_dynamo",
    "set_grad_enabled",
    "size_with",
    "snapshot_fake",
    "symbols_of",
    "tag_activation_checkpoint",
    "torch_version",
    "views_by_their_ops",
    "watch_all",
    "why_eager",
    "with_composites",
    "without_cudnn",
    "without_effects",
    "without_modes",
    "without_torch_function",
    "without_traces",
]


def is_composite(op: Any) -> bool:
    """Whether ATen writes an op with other ops, for every device."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd  # type: ignore[attr-defined]
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key))


#: Autograd undoes a write to a view by the view's op, and not by strides over memory.
views_by_their_ops = functools.partial(_force_original_view_tracking, True)
#: Whether two tensors are of one memory.
is_alias = torch._C._is_alias_of  # type: ignore[attr-defined]

#: What torch raises where a size or a number depends on values.
DATA_DEPENDENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
)

#: Higher-order ops that only run a body, and where the body's operands begin in their arguments.
INLINED = {wrap_body: 1, invoke_subgraph: 2}

#: What Dynamo writes for ``x.data``.
get_data = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]


def fake_mode_of(*values: Any) -> FakeTensorMode | None:
    """The fake mode of the first fake tensor among ``values``."""
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
    return None


def flattened(mesh: DeviceMesh, axes: tuple[str, ...]) -> DeviceMesh:
    """Several axes of a mesh, in its order, as one; torch makes their groups once."""
    return mesh[axes]._flatten(",".join(axes))


def no_tracing_context() -> AbstractContextManager[Any]:
    """Trace by ourselves inside a Dynamo backend: its tracing context has another fake mode."""
    return tracing(None)


def placeholder_source(node: fx.Node) -> tuple[str, bool]:
    """(Dynamo's name of an input, is it a parameter or buffer). Only inside the backend call."""
    grapharg = node.meta.get("grapharg")
    source = getattr(grapharg, "source", None)
    if source is None:
        return str(node.target), False
    name = source.name() if callable(source.name) else source.name
    is_state = isinstance(grapharg.example, torch.nn.Parameter) or "._buffers[" in name
    return name, is_state


def compile_with_hooks(module: torch.nn.Module, compiled: Callable[[Any], Any]) -> None:
    """Compile a module's call with the hooks around its forward, as ``Module.compile`` does; in one
    graph, where Dynamo would take torch's own function apart."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    module._compiled_call_impl = compiled(call)


def call_of_dtensor(node: fx.Node) -> tuple[str, dict[str, Any]] | None:
    """Which of DTensor's own calls a node of Dynamo's is, and its keyword arguments. Before torch
    2.13 each is a function ``prim from_local``, made for the call, with these in its closure."""
    target: Any = node.target
    if node.op == "call_method" and isinstance(node.args[0].meta.get("example_value"), DTensor):  # type: ignore[union-attr]
        return (target, dict(node.kwargs)) if target in ("redistribute", "to_local") else None
    if target is DTensor.from_local:
        return "from_local", dict(node.kwargs)
    found = re.fullmatch(
        r"prim.(from_local|redistribute|to_local)", getattr(target, "__name__", "")
    )
    if node.op != "call_function" or found is None:
        return None
    held = inspect.getclosurevars(target).nonlocals.get("kwargs_as_value", {})
    return found[1], {**held, **node.kwargs}


def is_mesh(x: Any) -> bool:
    """Whether a graph's input is a DeviceMesh, or stands for one while it is traced."""
    return isinstance(x, DeviceMesh) or isinstance(getattr(x, "real_obj", None), DeviceMesh)


VMAP_PARTS = {VMAP_BEGINS, VMAP_ENDS, VMAP_PREPARES, _add_batch_dim, _remove_batch_dim}


def is_of_functorch(target: Any) -> bool:
    """Whether a call in Dynamo's graph belongs to a transform of torch.func."""
    if not inspect.isroutine(target):
        return False
    module = getattr(target, "__module__", None) or ""
    return module.startswith(("torch._functorch", "torch._C._functorch"))


@contextmanager
def functorch_restored() -> Iterator[None]:
    """Leave functorch's levels as they were, whatever is raised in between."""
    depth = functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        if functorch.get_dynamic_layer_stack_depth() > depth:
            functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


@contextmanager
def without_function_modes(kind: type[TorchFunctionMode]) -> Iterator[None]:
    """Leave the innermost mode of torch functions, if it is of this kind."""
    stack = overrides._get_current_function_mode_stack()
    if not stack or not isinstance(stack[-1], kind):
        yield
        return
    with overrides._pop_mode_temporarily():
        yield


@contextmanager
def without_effects() -> Iterator[None]:
    """Trace checks of linear algebra as plain ops: as effects they would add tokens to the inputs
    and outputs."""
    effect: Any = getattr(library_registry.find("aten::_linalg_check_errors"), "effect", None)
    before = getattr(effect, "_effect", None)
    if before is None:  # an older torch, to which it is a plain op
        yield
        return
    effect._effect = None
    try:
        yield
    finally:
        effect._effect = before


@contextmanager
def with_composites() -> Iterator[None]:
    """Trace our composite ops as themselves, of which torch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="At pre-dispatch tracing")
        yield


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Trace batch norms and recurrences as ATen's own ops: of ``cudnn_batch_norm`` torch does not
    say that it writes the running statistics."""
    before = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(before)


def mark_changing(x: torch.Tensor, dim: int) -> None:
    """Let Dynamo take a size for a number that changes, unless the program needs it to be one."""
    torch._dynamo.maybe_mark_dynamic(x, dim)


def symbols_of(value: Any) -> frozenset[Any]:
    """The symbols of a size that Dynamo does not know, or of a number made of some."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return frozenset()
    return frozenset(getattr(value.node.expr, "free_symbols", ()))


def size_with(value: Any, symbols: frozenset[Any], n: int) -> int:
    """A size where these symbols are n, and others what they are (with a guard on each)."""
    if not symbols & symbols_of(value):
        return int(value)
    return int(value.node.expr.xreplace(dict.fromkeys(symbols, n)))


def is_linear(value: Any, symbols: frozenset[Any]) -> bool:
    """Whether a size grows with these symbols by whole numbers."""
    if not symbols & symbols_of(value):
        return True
    expression = value.node.expr
    if not isinstance(value, torch.SymInt) or not expression.is_polynomial(*symbols):
        return False
    return all(expression.diff(symbol).is_Integer for symbol in symbols)


def bake_floats(module: fx.GraphModule) -> None:
    """Raise Restart if a float of Python's (``LayerNorm.eps`` under ``dynamic=True``) came as a
    tensor whose item is taken: Dynamo traces anew, with its value and a guard on that."""
    taken = [n.meta.get("example_value") for n in module.graph.nodes if n.target == "item"]
    floats = [v for v in taken if isinstance(v, torch.SymFloat) and v.node.has_hint()]
    for value in floats:
        TensorifyState.specialize(str(value.node._expr))
    if floats:
        raise Restart


_regions = count()


def policy_of(region: fx.GraphModule) -> Callable[..., Any] | None:
    """The policy of a selective checkpoint, made anew for each region as in eager mode. None of a
    plain checkpoint, and of one whose ``context_fn`` makes other contexts (``has_contexts``)."""
    if not has_contexts(region):
        return None
    forward, _ = region.meta["_checkpoint_context_fn"]()
    policy: Callable[..., Any] | None = getattr(forward, "policy_fn", None)
    return policy


def has_contexts(region: fx.GraphModule) -> bool:
    return "_checkpoint_context_fn" in region.meta


def recompute_marks() -> dict[str, Any]:
    """What ``torch.utils.checkpoint`` puts on a region's nodes, for AOTAutograd's partitioner."""
    return {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": next(_regions)}


def has_decomposition(op: Any) -> bool:
    """Whether torch can say an op in terms of others."""
    return op in decomposition_table or op._can_decompose()


def decompose_op(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """By ATen's own composite, which has derivatives, or by torch's table in Python."""
    if op._can_decompose():
        return op.decompose(*args, **kwargs)
    own = (list(a) if isinstance(a, list) else a for a in args)  # some write into their lists
    return decomposition_table[op](*own, **kwargs)


def decompositions_for_inductor() -> dict[Any, Any]:
    """What Inductor expects to be decomposed already in a graph that is handed to it."""
    from torch._inductor.decomposition import select_decomp_table  # slow to import

    return select_decomp_table()


def rename_afresh(graph: fx.Graph, names: dict[fx.Node, str]) -> None:
    """Name nodes as if no name had been used before; a number is added where one is taken."""
    graph._graph_namespace = _Namespace()
    for node in graph.nodes:
        node.name = graph._graph_namespace.create_name(names.get(node, node.name), node)


encoder_layer_op = torch._transformer_encoder_layer_fwd
multi_head_attention_op = torch._native_multi_head_attention


BY_ITSELF = "Mosaic compiles it by itself"
Watched = Callable[[Callable[..., Any]], Callable[..., Any]]  # the same function, watched


def watch_all(backend: Callable[..., Any], watch: Callable[[Any], Watched]) -> None:
    """What torch.compile makes of a function with ``backend`` becomes ``watch(options)(it)``;
    ``watch`` is called once for each torch.compile, also where that does nothing.

    Another torch.compile, whose function calls this one, breaks its graph there and calls it; of
    this function itself it is refused. Dynamo would take the body into a graph for the other
    backend, and ours, with all that it watches over, not be asked.
    """
    wrapper: Any = torch._TorchCompileWrapper  # type: ignore[attr-defined]
    made_wrapper, compile_it = wrapper.__init__, eval_frame.OptimizeContext.__call__

    @functools.wraps(made_wrapper)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made_wrapper(self, *args, **kwargs)
        if self.compiler_fn is backend:
            self.watched = watch(self.kwargs.get("options"))

    @functools.wraps(compile_it)
    def call(self: Any, fn: Any) -> Any:
        callback = self.callback
        compiler: Any = eval_frame.innermost_backend(callback) if callable(callback) else None
        watched = getattr(compiler, "watched", None)
        inner = getattr(fn, "forward", fn)
        if watched is None and getattr(inner, "_torchdynamo_disable_msg", None) == BY_ITSELF:
            raise UnsupportedError(
                "a function that is compiled with backend='mosaic' is compiled with another one",
                fix="compile it once; Mosaic's own inner compiler is Inductor",
            )
        compiled: Any = compile_it(self, fn)
        if watched is None or isinstance(compiled, torch.nn.Module):  # it calls this for a method
            return compiled
        alone: Any = torch.compiler.disable(watched(compiled), reason=BY_ITSELF)
        alone._torchdynamo_orig_callable = compiled._torchdynamo_orig_callable
        alone.get_compiler_config = compiled.get_compiler_config
        return alone

    wrapper.__init__ = init
    eval_frame.OptimizeContext.__call__ = call  # type: ignore[method-assign]


def one_graph_under_ddp() -> Callable[[], None]:
    """Until the returned function is called, Dynamo gives the backend the whole graph of a model
    in DistributedDataParallel, not the pieces that its own reducer would like."""
    patch = dynamo_config.patch(optimize_ddp=False)
    patch.__enter__()
    return functools.partial(patch.__exit__, None, None, None)


class Unheard:
    """In place of the module ``warnings``."""

    @staticmethod
    def warn(*args: Any, **kwargs: Any) -> None:
        pass


UNHEARD = Unheard()


@contextmanager
def without_flex_warnings() -> Iterator[None]:
    """Dynamo breaks the graph at a warning, and transformers calls ``create_block_mask`` in a way
    that torch warns of: behind the break nobody knew what the mask is made of."""
    flex, before = sys.modules["torch.nn.attention.flex_attention"], warnings
    setattr(flex, "warnings", UNHEARD)  # noqa: B010
    try:
        yield
    finally:
        setattr(flex, "warnings", before)  # noqa: B010


def averages() -> list[tuple[str, set[int]]]:
    """(name, ranks) of what will average the gradients of the forward that is under way."""
    ddp = DistributedDataParallel._get_active_ddp_module()
    found = []
    if ddp is not None:
        found.append(("DistributedDataParallel", set(get_process_group_ranks(ddp.process_group))))
    for state in [reference() for reference in _module_state_mapping.values()]:
        if isinstance(state, FSDPState) and state._training_state == TrainingState.FORWARD:
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in groups:
                if group is not None and group.gradient_divide_factor is None:
                    found.append(("fully_shard", set(group.mesh_info.mesh.mesh.flatten().tolist())))
    return found


#: What stands between the user's function and its graph; between torch.compile's wrapper and it.
WRAPPERS = (os.path.dirname(eval_frame.__file__), os.path.dirname(__file__))
CALLERS = (
    os.path.dirname(eval_frame.__file__),
    torch.nn.modules.module.__file__,
    torch.nn.parallel.distributed.__file__,
)


def stands_in(frame: Any) -> bool:
    """Whether a frame is what Dynamo compiles in place of a function of torch's own, or of a unit
    (``frontend/dtensors.py``)."""
    code = frame.f_code
    if code.co_name == "call_on_plain":
        return True
    return code.co_filename == external_utils.__file__ and code.co_name in ("inner", "wrapper")


def is_whole_function(is_compiled: bool) -> bool:
    """Whether the graph that Dynamo compiles now (or runs: ``is_compiled``) is of the very function
    that the user gave to torch.compile, from its beginning; not of one that it calls, or of what is
    left of it behind a break. Only inside the backend call, or in what it returned."""
    frame: Any = sys._getframe(1)
    if is_compiled:
        while frame.f_code.co_filename.startswith(WRAPPERS) and not stands_in(frame):
            frame = frame.f_back
        frame = frame.f_back  # the user's function, as Dynamo has written it anew
    else:
        while frame is not None and not isinstance(frame.f_locals.get("self"), CatchErrorsWrapper):
            frame = frame.f_back  # Dynamo's own, down to where it took the user's frame over
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        if not frame.f_code.co_filename.startswith(CALLERS):
            return False
        frame = frame.f_back
    return frame is not None


def inputs_that_dynamo_has() -> list[Any]:
    """The values that stand for the inputs of the function that Dynamo compiles now, of those that
    it has met so far."""
    translator = getattr(dynamo_thread, "current_tx", None)
    if translator is None:
        return []
    graph = translator.output.root_tracer.graph
    return [n.meta.get("example_value") for n in graph.find_nodes(op="placeholder")]


def break_after(module: fx.GraphModule) -> tuple[str, FrameSummary | None] | None:
    """Why the program breaks behind Dynamo's graph, and the user's line; None: it returns."""
    ended = getattr(module, "compile_subgraph_reason", None)
    if ended is None or not ended.graph_break:
        return None
    reason = next(iter(ended.reason.strip().splitlines()), "")
    return reason, ended.user_stack[-1] if ended.user_stack else None


@contextmanager
def without_traces() -> Iterator[list[CodeType]]:
    """Let Dynamo compile whatever it has compiled before, and forget afterwards what it has made of
    the functions in this list; all others stay compiled."""
    compiled: list[CodeType] = []
    limits = {"recompile_limit": sys.maxsize, "accumulated_recompile_limit": sys.maxsize}
    with dynamo_config.patch(limits):
        try:
            yield compiled
        finally:
            for code in compiled:
                reset_code(code)


def code_at_hand() -> CodeType:
    """Of the function that Dynamo compiles now. Only inside the backend call."""
    frame: Any = sys._getframe(1)
    while not isinstance(frame.f_locals.get("self"), CatchErrorsWrapper):
        frame = frame.f_back
    code: CodeType = frame.f_locals["frame"].f_code
    return code


def never_compiles() -> bool:
    """Whether torch.compile gives every function back as it is."""
    return os.environ.get("TORCHDYNAMO_DISABLE", "") == "1"


def why_eager() -> str:
    """Why Dynamo has run a function eagerly, as far as it says so."""
    if never_compiles():
        return "TORCHDYNAMO_DISABLE=1"
    if eval_frame._stance.stance != "default":
        return f"torch.compiler.set_stance({eval_frame._stance.stance!r})"
    if dynamo_config.disable:
        return "torch._dynamo.config.disable"
    return (
        "Dynamo skipped it (as FullyShardedDataParallel without use_orig_params=True, or a call of "
        "nn.LSTM, nn.GRU or nn.RNN without torch._dynamo.config.allow_rnn=True), or compiled "
        f"torch._dynamo.config.recompile_limit = {dynamo_config.recompile_limit} versions of it "
        "(TORCH_LOGS=dynamo,recompiles says which)"
    )


def compiles_left() -> int | None:
    """How many more versions Dynamo will compile of the function at hand; None if not known."""
    compile_id = CompileContext.current_compile_id()
    if compile_id is None or compile_id.frame_compile_id is None:
        return None
    return dynamo_config.recompile_limit - compile_id.frame_compile_id - 1


#: The cache does not see our lowering; and both graphs are compiled at once, on all ranks alike.
AOT_CONFIG = {
    "enable_autograd_cache": False,
    "force_non_lazy_backward_lowering": True,
    "graphsafe_rng_functionalization": False,  # its numbers are not those of the generator
}
Lower = Callable[[fx.Graph, str], None]  # of the "joint", "forward" and "backward" graph


def is_in_backward(node: fx.Node) -> bool:
    """Whether a node of the joint graph was traced by backward."""
    return node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def bind_to_backward(node: fx.Node) -> None:
    """Keep a node of the joint graph that backward traced out of forward."""
    if node.meta.get("partitioner_tag") == "is_backward":
        node.meta["partitioner_tag"] = "must_be_in_backward"


LEAST = 1e-6  # with none at all the partitioner runs everything again, whatever is marked


@contextmanager
def keeping_what_is_marked() -> Iterator[None]:
    """The partitioner keeps what is marked MUST_SAVE under any budget for activations. Where
    nothing else is left to choose from, torch saves a tuple for its items, which no graph returns.
    """
    choose = partitioners.choose_saved_values_set

    def saved(joint: fx.Graph, info: Any, memory_budget: float = 1) -> list[fx.Node]:
        chosen = choose(joint, info, memory_budget=max(memory_budget, LEAST))
        items = [[*x.users] if isinstance(x.meta.get("val"), tuple) else [x] for x in chosen]
        return [item for some in items for item in some]

    setattr(partitioners, "choose_saved_values_set", saved)  # noqa: B010
    try:
        yield
    finally:
        setattr(partitioners, "choose_saved_values_set", choose)  # noqa: B010


class JointPass(CustomGraphPass):
    """Our work on the joint graph as Inductor wants it."""

    def __init__(self, work: Lower):
        self.work = work

    def __call__(self, graph: fx.Graph) -> None:
        self.work(graph, "joint")

    def uuid(self) -> str:
        return (
            "mosaic"  # what comes out is in the lowered graph, on which Inductor's cache is keyed
        )


def compile_by_inductor(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    lower: Lower,
    shorten: Callable[[fx.GraphModule], fx.GraphModule],
) -> Callable[..., Any]:
    """AOTAutograd, our lowering of both graphs, Inductor. ``shorten`` makes a graph one that takes
    less time to compile; Inductor's wrapper in C++ knows no subgraphs.

    AOTAutograd's cache does not see our lowering (another rank's code came out of it) and is off;
    Inductor's own cache is keyed on the lowered graph, rank and all. Reordering for peak memory
    goes by local sizes, which differ between ranks, so it is off too.
    """
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(graph: fx.GraphModule, examples: Sequence[Any], **kwargs: Any) -> Any:
        lower(graph.graph, "backward" if kwargs.get("is_backward") else "forward")
        graph.recompile()
        program = graph if inductor_config.cpp_wrapper else shorten(graph)
        return compile_fx_inner(program, examples, **kwargs)

    patches = {"reorder_for_peak_memory": False, "joint_custom_pre_pass": JointPass(lower)}
    with functorch_config.patch(AOT_CONFIG), keeping_what_is_marked():
        compiled: Any = compile_fx(module, inputs, inner_compile=inner, config_patches=patches)
    return compiled


def compile_by_eager(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    lower: Lower,
    guard: Callable[[fx.Graph], fx.Graph],
) -> Callable[..., Any]:
    """AOTAutograd and our lowering of both graphs, run node by node: for tests and for reading.
    ``guard`` makes a graph right for other strides than were traced."""

    def compiler(kind: str) -> Callable[..., Any]:
        def compile_graph(graph: fx.GraphModule, examples: Sequence[Any]) -> Any:
            lower(graph.graph, kind)
            return make_boxed_func(fx.GraphModule(graph, guard(graph.graph)).forward)

        return compile_graph

    def split(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        lower(joint.graph, "joint")
        return min_cut_rematerialization_partition(joint, *args, **kwargs)

    with functorch_config.patch(AOT_CONFIG), keeping_what_is_marked():
        return aot_autograd(
            fw_compiler=compiler("forward"),
            bw_compiler=compiler("backward"),
            partition_fn=split,
        )(module, inputs)


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def flex_op_of_subclasses(
    rules: Mapping[type, Callable[..., Any]], as_whole: Callable[[Any], Any]
) -> None:
    """What ``flex_op`` does with tensors of these classes; where Dynamo runs it on sizes, beside
    plain ones, with those that ``as_whole`` gives."""
    known = flex_op.python_key_table
    known.update(rules)
    on_sizes = known[FakeTensorMode]

    def run(mode: FakeTensorMode, *args: Any) -> Any:
        with mode:
            args = pytree.tree_map(as_whole, args)
        return on_sizes(mode, *args)

    known[FakeTensorMode] = run


def lists_of_blocks(seen: Tensor, block: tuple[int, int], whole_apart: bool) -> list[Tensor]:
    """As ``create_block_mask`` makes them of a mask (batch, heads, queries, keys)."""
    kinds = _convert_mask_to_block_mask(seen, *block, separate_full_blocks=whole_apart)
    return [x for kind in kinds if kind is not None for x in _dense_to_ordered(kind)]


#: What ``torch.nn.attention.flex_attention`` tells its kernels itself.
FLEX_OPTIONS = {
    "BACKEND": "TRITON",  # not the one for few queries, which has other blocks
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}


def flex_blocks(
    lengths: tuple[int, int], lists: Sequence[Tensor], size: int, mask_mod: Callable[..., Tensor]
) -> tuple[Any, ...]:
    """A mask as the kernels take it. ``lists``: how many blocks, and which, of a row and of a
    column in which a part is seen, then of those in which all is."""
    counts, indices, column_counts, column_indices = lists[:4]
    full_counts, full_indices, full_column_counts, full_column_indices = lists[4:]
    return BlockMask(
        lengths,
        kv_num_blocks=counts,
        kv_indices=indices,
        full_kv_num_blocks=full_counts,
        full_kv_indices=full_indices,
        q_num_blocks=column_counts,
        q_indices=column_indices,
        full_q_num_blocks=full_column_counts,
        full_q_indices=full_column_indices,
        BLOCK_SIZE=(size, size),
        mask_mod=mask_mod,
    ).as_tuple()


def _same_score(score: Tensor, *pair: Tensor) -> Tensor:
    return score


def _same_gradient(score: Tensor, *pair_and_gradient: Tensor) -> list[Tensor | None]:
    return [pair_and_gradient[-1], None, None, None, None]


#: The function of a pair, or a mask with it, and its buffers.
FlexMod = tuple[Any, tuple[Tensor, ...]]


def flex_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: FlexMod,
    scale: float,
    change: FlexMod,
) -> tuple[Tensor, Tensor]:
    """out and lse, to the base of 2. ``mask``: of ``flex_blocks``; ``change``: the function of a
    score, or None. Each with what its function takes after a pair."""
    op = torch.ops.higher_order.flex_attention
    given = (change[0] or _same_score, mask[0], scale, FLEX_OPTIONS, change[1], mask[1])
    out, lse, *_ = op(q, k, v, *given)
    return out, lse


def flex_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: FlexMod,
    scale: float,
    change: FlexMod,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of these keys, with the output and log-sum-exp of all."""
    op = torch.ops.higher_order.flex_attention_backward
    mods = (_same_score, _same_gradient) if change[0] is None else _with_gradient(q, *change)
    given = (q, k, v, out, lse, dout, torch.zeros_like(lse), *mods)
    dq, dk, dv, *_ = op(*given, mask[0], scale, FLEX_OPTIONS, change[1], mask[1])
    return dq, dk, dv


def _with_gradient(
    q: Tensor, change: Callable[..., Tensor], buffers: tuple[Tensor, ...]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The function of a score, and that of its gradients."""
    batch, head, query, key = (q.new_zeros((), dtype=torch.int) for _ in range(4))
    with torch.enable_grad():
        score = q.new_zeros((), requires_grad=True)
        return create_fw_bw_graph(change, (score, batch, head, query, key), buffers)


@contextmanager
def recording() -> Iterator[None]:
    """Inside of an op of ours: autograd records again, as outside of every op."""
    keys: Any = torch._C.DispatchKey  # type: ignore[attr-defined]
    kept: Any = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor):
        kept = kept.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, kept), torch.enable_grad():
        yield


def compiled_by_inductor(
    function: Callable[..., Any], inputs: Sequence[Tensor]
) -> Callable[..., Any]:
    """``function`` for inputs like these, without gradients."""
    from torch._inductor.compile_fx import compile_fx

    graph = make_fx(function, tracing_mode="fake")(*inputs)
    compiled: Any = compile_fx(graph, list(inputs))
    return compiled
