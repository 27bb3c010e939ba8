"""Where packed texts begin, for calls of flash attention and of recurrences: any number of texts is
one program.

the user calls with      cu_seqlens: i32[4]           0, 11, 29, 37
Dynamo sees              cu_seqlens: i32[s0]          with a guard s0 <= 1024
the program is given     cu_seqlens: i32[1024]        0, 11, 29, 37, 37, 37, ...    empty texts
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from mosaic.frontend import flash
from mosaic.frontend.lengths import fake_of, lengthened
from mosaic.frontend.recurrences import edges_of
from mosaic.graph.source import nodes_of
from mosaic.torch_private import size_with, symbols_of

#: Fewer texts are padded to so many; more to the next power of two.
LEAST = 1024


@dataclass(frozen=True)
class Texts:
    """The inputs of a graph, by number, that say where texts begin, of sizes that Dynamo leaves
    open; ``most``: to how many numbers they are padded."""

    values: dict[int, Tensor]
    symbols: frozenset[Any]
    most: int

    def size(self, value: Any) -> int:
        """Of Dynamo's sizes, with these padded."""
        return size_with(value, self.symbols, self.most)

    def guard(self) -> None:
        """Let Dynamo take the program for as many texts."""
        for x in self.values.values():
            if not x.shape[0] <= self.most:  # asked of a symbol, this is the guard
                raise AssertionError(f"{x.shape[0]} numbers are more than {self.most}")

    def padded(self, args: Sequence[Any]) -> list[Any]:
        """A call's inputs, with empty texts behind the others."""
        found = [*args]
        for index in self.values:
            found[index] = lengthened(found[index], 0, self.most)
        return found

    def examples(self, examples: Sequence[Any]) -> list[Any]:
        """What the program is compiled with: fakes where it is padded."""
        found = [self.size(x) if self.symbols & symbols_of(x) else x for x in examples]
        for index, x in self.values.items():
            found[index] = fake_of(x, [self.most])
        return found


def texts_of(module: fx.GraphModule) -> Texts | None:
    """None where there are none, or the graph does more with them, or with their number, than
    give them to such calls."""
    begins = {node for call in module.graph.nodes for node in begins_of(call)}
    values = {
        index: node.meta["example_value"]
        for index, node in enumerate(module.graph.find_nodes(op="placeholder"))
        if node in begins and symbols_of(node.meta["example_value"].shape[0])
    }
    if not values:
        return None
    symbols = frozenset().union(*(symbols_of(x.shape[0]) for x in values.values()))
    for node in nodes_of(module):
        if any(x in begins for x in node.all_input_nodes) and not only_begins(node, begins):
            return None
        is_input = node.op == "placeholder" and (node in begins or not node.users)
        if not is_input and symbols & set(sizes_in(node.meta.get("example_value"))):
            return None
    most = max(LEAST, *(1 << (int(x.shape[0].node.hint) - 1).bit_length() for x in values.values()))
    return Texts(values, symbols, most)


def begins_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that tell a call where texts begin."""
    return [*flash.begins_of(node), *edges_of(node)]


def only_begins(node: fx.Node, begins: set[fx.Node]) -> bool:
    """Whether a call takes them for nothing else than where texts begin."""
    given = [x for x in node.all_input_nodes if x in begins]
    return set(given) <= set(begins_of(node))


def sizes_in(value: Any) -> Iterator[Any]:
    """The symbols of a number, or of a tensor's sizes."""
    for size in value.shape if isinstance(value, Tensor) else [value]:
        yield from symbols_of(size)
