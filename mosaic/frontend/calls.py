"""Every call of a compiled function is watched, from outside of what Dynamo makes of it.

Dynamo may run a function eagerly, or in pieces, without a word: past the recompile limit, under
``torch.compiler.set_stance``, where it skips a frame, where it breaks the graph. That is right,
since whole tensors are whole and ShardedTensors know what they are of; but gradients of an eager
op are whole, and where shares are asked for

* the compiled program must be one graph: ``check_one_graph`` says so before anything runs;
* every call must have run it: ``watched`` stands around each, and refuses the result of one that
  has not.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import fx

from mosaic.api.errors import ShardingError, UnsupportedError
from mosaic.api.spec import ShardingSpec, path_parts
from mosaic.frontend.flash import allow_package
from mosaic.frontend.lengths import mark
from mosaic.frontend.model_inputs import replaced
from mosaic.frontend.recurrences import allow_functions
from mosaic.frontend.user_warnings import once, resumed_at
from mosaic.graph.source import shown
from mosaic.partition.values import Axis
from mosaic.runtime.deferred_tensor import DeferredTensor, Recipe, flattened
from mosaic.runtime.mesh import current_context
from mosaic.runtime.sharded_tensor import ShardedTensor
from mosaic.torch_private import (
    averages,
    break_after,
    is_whole_function,
    never_compiles,
    one_graph_under_ddp,
    pytree,
    why_eager,
    without_flex_warnings,
)


class Owner(Protocol):
    """Who adds up the gradients of a model that is compiled in units."""

    shares: bool
    has_units: bool  # which are parts of the model

    @property
    def length(self) -> int: ...

    def planned(self, axes: Sequence[Axis]) -> None: ...


@dataclass
class Made:
    """What one ``torch.compile`` made."""

    options: Mapping[str, Any] | None = None
    graphs: int = 0  # compiled for it so far

    @property
    def spec(self) -> ShardingSpec:
        spec = (self.options or {}).get("spec")
        return spec if isinstance(spec, ShardingSpec) else ShardingSpec()


@dataclass
class Call(AbstractContextManager["Call"]):
    """One call of it."""

    made: Made
    runs: int = 0  # of graphs that Mosaic compiled
    shares: int = 0  # of them such as give shares of gradients
    _undo: Any = field(default=None, repr=False)

    def __enter__(self) -> Call:
        _calls().append(self)
        self._undo = one_graph_under_ddp()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo()
        _calls().remove(self)
        _local.last = self
        outer = current()
        if outer is not None:  # of a function that calls this one
            outer.runs += self.runs
            outer.shares += self.shares


_local = threading.local()


def _calls() -> list[Call]:
    if not hasattr(_local, "calls"):
        _local.calls = []
    calls: list[Call] = _local.calls
    return calls


def current() -> Call | None:
    """The innermost call under way in this thread."""
    return _calls()[-1] if _calls() else None


def watch(options: Mapping[str, Any] | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """How to watch the function that one ``torch.compile`` makes."""
    made = Made(options)
    if made.spec.gives_shares and never_compiles():
        say_it_ran_eagerly(made.spec)
    return partial(watched, made)


def watched(made: Made, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled``, with each call watched. Raises ShardingError for what ``Module.compile`` makes
    where parts are asked for: in another torch.compile Dynamo would go past it."""
    if made.spec.gives_shares and getattr(compiled, "__name__", "") == "_call_impl":
        raise ShardingError(
            "a module is compiled in place, and gradients are shares: another torch.compile around "
            "it would not see that, and run it as plain PyTorch",
            fix="model = torch.compile(model, ...) in place of model.compile(...)",
        )

    @functools.wraps(compiled, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        allow_package()
        allow_functions()
        mark(made.spec, signed(compiled), args, kwargs)
        with Call(made) as this, without_flex_warnings():
            result = compiled(*args, **kwargs)
        result = as_promised(result, made.spec, are_cut(args, kwargs))
        if not this.runs:
            say_it_ran_eagerly(made.spec)
        if made.spec.gradients == "shares" and size_of(made.spec) > 1:
            check_no_parameter(result)
        return result

    return call


def signed(compiled: Any) -> Callable[..., Any]:
    """The function whose arguments a compiled one takes: for a module's call its forward."""
    function: Any = compiled._torchdynamo_orig_callable
    owner: Any = getattr(function, "__self__", None)
    is_call = isinstance(owner, torch.nn.Module) and function.__name__ in CALLS
    return owner.forward if is_call else function


CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")


def are_cut(*arguments: Any) -> bool:
    """Whether any tensor among them is cut."""
    return any(isinstance(x, ShardedTensor) for x in flattened(pytree.tree_leaves(arguments)))


def as_promised(result: Any, spec: ShardingSpec, takes_cut: bool) -> Any:
    """A call's result, those outputs whole of which the spec says so. Raises ShardingError for a
    name that no output has."""
    if spec.outputs == "shards" or (spec.outputs == "whole" and takes_cut):
        return result
    said = spec.outputs if isinstance(spec.outputs, Mapping) else {}
    kept: set[int] = set()
    for name, choice in said.items():
        found: list[Any] = []
        replaced(result, (str(name),) if isinstance(name, int) else path_parts(name), found.append)
        if not found:
            raise ShardingError(
                f"the function has no output {name!r}",
                outputs=str(list(result)) if isinstance(result, Mapping) else type(result).__name__,
                fix='name one that it gives: outputs={"logits": "shards"}, or by number',
            )
        kept |= {id(x) for x in pytree.tree_leaves(found) if choice == "shards"}

    def promised(x: Any) -> Any:
        if isinstance(x, DeferredTensor):
            x = of_whole_leaves(x) if x.is_dear else x.made()
        is_kept = id(x) in kept or not isinstance(x, ShardedTensor)
        return x if is_kept else x.full_tensor()

    waits = any(isinstance(x, DeferredTensor) for x in pytree.tree_leaves(result))
    return pytree.tree_map(promised, result) if waits or are_cut(result) else result


def of_whole_leaves(x: DeferredTensor) -> DeferredTensor:
    """Logits that nobody has read yet, of whole hidden states: one rank may read them alone."""
    leaves = flattened([x])
    if not are_cut(leaves):
        return x
    recipe = Recipe(x.steps, (), tuple(x.shape), x.dtype, x.device)
    return recipe.of([y.full_tensor() if isinstance(y, ShardedTensor) else y for y in leaves])


def goes_on(module: fx.GraphModule) -> bool:
    """Whether what Dynamo's graph gives is used by more of the function that was compiled: its
    outputs may stay cut, and ``watched`` makes whole what is left of them in the end."""
    if current() is None:
        return False
    return break_after(module) is not None or not is_whole_function(is_compiled=False)


def counted() -> int:
    """Count a graph that is compiled; which one it is of its ``torch.compile``, from 1."""
    call = current()
    if call is None:
        return 1
    call.made.graphs += 1
    return call.made.graphs


@contextmanager
def planned(options: Mapping[str, Any]) -> Iterator[None]:
    """A call of which only the plan is wanted: that it runs no graph is meant."""
    _calls().append(Call(Made(options)))
    try:
        yield
    finally:
        _calls().pop()


def running(spec: ShardingSpec) -> None:
    """A graph of ours is run. Raises ShardingError where parts are asked for, and it is only a
    piece of the function that was called: Dynamo shares what it has compiled between all callers.
    """
    call = current()
    if call is not None:
        call.runs += 1
        call.shares += spec.gives_shares
    if spec.gives_shares and not is_whole_function(is_compiled=True):
        raise in_pieces(spec, "a part of it was compiled by itself")
    if spec.gradients == "shares":
        check_not_averaged(spec)


def gave_shares(result: Any) -> bool:
    """Whether the last call, which gave ``result``, gives shares of its parameters' gradients."""
    last: Call = _local.last
    if last.shares:
        check_no_parameter(result)
    return 0 < last.shares == last.runs


def size_of(spec: ShardingSpec) -> int:
    context = current_context()
    return 1 if context is None else context.size(spec.mesh)


def check_no_parameter(result: Any) -> None:
    """Raise UnsupportedError for a parameter, or a view of one, that is returned. Dynamo hands it
    out beside the graph: what comes back for it is a whole gradient, where others give shares."""
    for out in pytree.tree_leaves(result):
        base = getattr(out, "_base", None)
        found = out if base is None else base
        if isinstance(found, torch.nn.Parameter) and found.requires_grad:
            raise UnsupportedError(
                "the function returns a parameter or a view of it, and gradients are shares: "
                "what comes back for it is a whole gradient",
                sizes=list(out.shape),
                fix="return a copy (w.clone()), or leave gradients whole",
            )


def check_not_averaged(spec: ShardingSpec) -> None:
    """Raise ShardingError under a wrapper (DDP, FSDP2) that averages over ranks whose shares add up
    to the gradient."""
    context = current_context()
    if context is None:
        return
    mine = set(dist.get_process_group_ranks(context.group(spec.mesh)))
    for name, averaged in averages():
        if len(mine & averaged) > 1:
            raise ShardingError(
                f"gradients are shares, and {name} averages them: "
                f"they would be {len(mine & averaged)} times too small",
                ranks=f"shares of {sorted(mine)}, average over {sorted(averaged)}",
                fix=SUMMED[name],
            )


WHOLE = 'leave gradients whole (gradients="whole"): the average of equal ones is right; or '
SUMMED = {
    "DistributedDataParallel": WHOLE
    + "give it a process_group of the data-parallel ranks, and sum along the other axis",
    "fully_shard": WHOLE + "call set_gradient_divide_factor on the wrapped modules, with the "
    "number of data-parallel ranks",
}


def say_it_ran_eagerly(spec: ShardingSpec) -> None:
    """Raise ShardingError where that is wrong; elsewhere warn once."""
    if size_of(spec) == 1:
        return
    why = why_eager()
    if not spec.gives_shares:
        once(f"the compiled function ran eagerly, unsharded: {why}")
        return
    raise ShardingError(
        "the compiled function ran eagerly, and gradients are shares: those of an eager run are "
        "whole",
        reason=why,
        fix="do not use the result of this call; let the function be compiled, or use "
        'gradients="whole", with which an eager run is right',
    )


def check_one_graph(module: fx.GraphModule, spec: ShardingSpec) -> None:
    """Raise ShardingError where parts are asked for, and a graph is not the whole program."""
    if current() is None:
        raise ShardingError(
            "gradients are shares, and nothing watches that no call runs eagerly",
            fix='compile it with torch.compile(model, backend="mosaic", options={"spec": spec}), '
            "or with mosaic.shard",
        )
    ends = break_after(module)
    if ends is not None:
        reason, at = ends
        raise ShardingError(
            f"the graph breaks, and {SHARES}",
            where=at and f"{shown(at.filename)}:{at.lineno} in {at.name}\n  {at.line}",
            reason=reason,
            fix=UNBROKEN,
        )
    if not is_whole_function(is_compiled=False):
        resumed = resumed_at(module.graph)
        raise in_pieces(
            spec, f"graph break in {resumed}" if resumed else "a part of it is compiled by itself"
        )


def in_pieces(spec: ShardingSpec, reason: str) -> ShardingError:
    return ShardingError(
        f"the program is not one graph, and {SHARES}",
        reason=reason,
        fix=UNBROKEN,
    )


SHARES = "gradients are shares: what Python does with a parameter in between would add whole ones"
UNBROKEN = (
    "remove the break (torch.compile(..., fullgraph=True) names its reason), compile the model "
    'inside of its wrapper (DDP(torch.compile(model))), or use gradients="whole"'
)
