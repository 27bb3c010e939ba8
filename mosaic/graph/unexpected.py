"""What is raised inside Mosaic and is not ours leaves it as a MosaicError.

Dynamo takes some exceptions of a backend (torch's own of data-dependent sizes) for a graph break:
nothing would then be compiled, and parts of an axis be read as if they were whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

from mosaic.api.errors import MosaicError
from mosaic.graph.source import where
from mosaic.torch_private import DATA_DEPENDENT

FIX = (
    "keep this part out of the compiled function (torch.compiler.disable; what passes it is whole "
    "on every rank), and report the program"
)


@contextmanager
def blamed_on(node: fx.Node) -> Iterator[None]:
    """What goes wrong here is said with this node's line."""
    try:
        yield
    except Exception as error:
        raise ours(error, node) from error


def ours(error: BaseException, node: fx.Node | None = None) -> MosaicError:
    """The error that is ours in the chain of ``error``'s causes, or a new one that says all."""
    found = next((e for e in causes(error) if isinstance(e, MosaicError)), None)
    if found is not None:
        return found if found.where or node is None else found.at(where(node))
    title = "this is a bug in Mosaic, or an op that it does not know"
    if isinstance(error, DATA_DEPENDENT):
        title = "this depends on values, and a program is cut before there are any"
    notes = "; ".join(getattr(error, "__notes__", ()))
    return MosaicError(
        title,
        where=None if node is None else where(node),
        error=f"{type(error).__name__}: {first_paragraph(str(error))}",
        **({"at": notes} if notes else {}),
        fix=FIX,
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from; Inductor keeps that as ``inner_exception``."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__


def first_paragraph(text: str) -> str:
    """Torch appends pages of graph and trace."""
    return " ".join(text.strip().split("\n\n")[0].split())[:300]
