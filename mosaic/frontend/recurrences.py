"""Calls of recurrences as transformers' models write them: taken whole, as one op.

    torch_chunk_gated_delta_rule(query, key, value, g=g, beta=beta, ...)
    ->   out, last_state = mosaic.recurrence([query, key, value, g, beta], "...")

Dynamo would write out their loops over chunks or tokens, in which nobody finds the recurrence. The
causal convolutions before them are written out, also those that a package has kernels for.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mosaic.api.errors import UnsupportedError
from mosaic.frontend.flash import located
from mosaic.recurrences.call import Recurrence, is_of_package
from mosaic.recurrences.kinds import KINDS, Kind
from mosaic.recurrences.op import RECURRENCE
from mosaic.recurrences.segments import widened
from mosaic.recurrences.texts import BEGINS, beginnings

#: Where such functions are: in a model's own module, the library's or one that came with weights.
MODULES = re.compile(r"(transformers\.models|transformers_modules)\..*modeling_\w+$")
CONVOLUTION = "causal_conv1d_fn"
#: Kernels of mamba_ssm for a convolution and its scan at once: models call both where they give
#: None, as what is written in their place does.
BOTH_AT_ONCE = ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined")
#: The arguments that say where packed texts are.
TEXTS = ("cu_seqlens", "seq_idx")


def call_of(target: Any) -> Callable[..., Any] | None:
    """What capture runs in place of a call in Dynamo's graph, if it is one of these."""
    name = getattr(target, "__name__", "")
    if MODULES.match(getattr(target, "__module__", None) or "") is None:
        return None
    if name in KINDS:
        return partial(recurrence, target)
    return partial(convolution, target) if name == CONVOLUTION else None


def recurrence(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of one of them, as the op."""
    kind = KINDS[function.__name__]
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    others = given.pop("kwargs", {})
    is_asked = given.pop(kind.asks, False)
    texts = texts_of(function, kind.texts, others)
    if texts is not None:
        x = next(iter(given.values()))
        check_texts(kind, texts, x, is_asked, given.get(kind.state))
        numbers = located(x.shape[1], texts)[1][None] if kind.texts == "cu_seqlens" else texts
        given[BEGINS] = beginnings(numbers).expand(len(x), -1)
    known, tensors = Recurrence.of(function, given, len(args))
    out, last = RECURRENCE(tensors, known.encode())
    if kind.is_pair:
        return out, last if is_asked else None
    return (out, last) if is_asked else out


def edges_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that tell such a call in Dynamo's graph where texts begin."""
    is_call = node.op == "call_function" and call_of(node.target) is not None
    edges = node.kwargs.get("cu_seqlens") if is_call else None
    return [edges] if isinstance(edges, fx.Node) else []


def texts_of(function: Callable[..., Any], name: str, given: Mapping[str, Any]) -> Tensor | None:
    """Where texts are, in the form that the function's package reads: it is deaf to the other one,
    and transformers refuses that without the package. What has none is deaf to both."""
    if not hasattr(function, "__wrapped__"):
        return None
    told = {form: given[form] for form in TEXTS if given.get(form) is not None}
    if told and name not in told and not is_of_package(function):
        raise UnsupportedError(
            f"{function.__name__} is told of packed texts by {', '.join(told)}",
            reason=f"it reads them from {name}" if name else "it has no form for them",
            fix=f"give {MODEL_ARGUMENT[name]} to the model" if name else "give it one text a row",
        )
    return told.get(name)


#: What models call them.
MODEL_ARGUMENT = {"cu_seqlens": "cu_seq_lens_q", "seq_idx": "seq_idx"}


def check_texts(kind: Kind, texts: Tensor, x: Tensor, is_asked: bool, first: Any) -> None:
    by_edges = kind.texts == "cu_seqlens"
    if first is not None or (is_asked and by_edges):
        raise UnsupportedError(
            "packed texts with a state that is given or asked for",
            reason="each text has a state of its own",
            fix="call the model with use_cache=False",
        )
    if by_edges and len(x) > 1:
        raise UnsupportedError(
            "cu_seqlens with several rows of texts",
            sizes=list(x.shape),
            fix="pack all texts into one row",
        )


def convolution(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Written out: a row of packed texts reads what is of its own text."""
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    others = given.pop("kwargs", {})
    texts = texts_of(function, "seq_idx", others)
    plain = inspect.unwrap(function)
    if texts is None:
        result: Tensor = plain(**given)
        return result
    x, weight, bias = given["hidden_states"], given["weight"], given.get("bias")
    width = weight.shape[-1]
    before = F.pad(widened(x), (width - 1, 0)).unfold(-1, width, 1)
    of_before = F.pad(texts, (width - 1, 0), value=-1).unfold(-1, width, 1)
    is_own = (of_before == texts[..., None])[:, None]
    out = (torch.where(is_own, before, 0) * weight[:, None]).sum(-1)
    out = out if bias is None else out + bias[:, None]
    if given.get("activation") is not None:
        out = sys.modules["transformers.activations"].ACT2FN[given["activation"]](out)
    return out.masked_fill(texts[:, None] < 0, 0).to(x.dtype)  # as the package fills padding


def allow_functions() -> None:
    """Have Dynamo keep calls of them, in the models that are imported."""
    for module in [sys.modules[name] for name in list(sys.modules) if MODULES.match(name)]:
        for name in (*KINDS, CONVOLUTION, *BOTH_AT_ONCE):
            function = getattr(module, name, None)
            if inspect.isfunction(function):
                allow(function)


@lru_cache(maxsize=1024)
def allow(function: Callable[..., Any]) -> None:
    """Dynamo runs what it keeps on tensors without memory, which a package's kernels cannot, and
    transformers refuses texts without them: there it finds ours in the function's place."""
    plain = inspect.unwrap(function)
    if plain is function:
        torch.compiler.allow_in_graph(function)
        return
    if function.__name__ in BOTH_AT_ONCE:
        torch.compiler.substitute_in_graph(function, skip_signature_check=True)(plain)
        return

    @torch.compiler.allow_in_graph
    @functools.wraps(function)
    def ours(*args: Any, **kwargs: Any) -> Any:
        run = call_of(function)
        assert run is not None
        return run(*args, **kwargs)

    kept = ours if is_of_package(function) else torch.compiler.allow_in_graph(plain)

    read = (*inspect.signature(function).parameters, *TEXTS)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        given = {name: x for name, x in kwargs.items() if name in read}
        if kwargs.get("cu_seqlens") is not None or kwargs.get("seq_idx") is not None:
            return ours(*args, **given)
        return kept(*args, **given)

    torch.compiler.substitute_in_graph(function, skip_signature_check=True)(stand_in)
