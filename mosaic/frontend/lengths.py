"""Inputs of many lengths: they are padded to a bucket's, and the program compiled for all of it.

    the user calls with      x: f64[2, 37, 8]
    Dynamo sees              x: f64[2, s0, 8]     with a guard 32 < s0 <= 64
    the program is given     x: f64[2, 64, 8]     whose last row stands in its padding, too
                             length: int64        37

Python sees the length itself, in its graph a symbol: what it decides by it is guarded, and what it
makes of it is found in the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from mosaic.api.buckets import Bucket, bucket_of
from mosaic.api.spec import ShardingSpec, binds, path_parts
from mosaic.frontend.capture import Captured, capture, read_inputs
from mosaic.frontend.model_inputs import named, replaced
from mosaic.frontend.sharded_inputs import Output, placeholder_values
from mosaic.frontend.unit_lengths import lengthened_part
from mosaic.graph.inputs import Input
from mosaic.graph.lengths import Length, NotPaddedError, compared
from mosaic.graph.source import nodes_of
from mosaic.layout import Place
from mosaic.report.plan import Plan
from mosaic.runtime.comm import take_runs
from mosaic.runtime.deferred_tensor import flattened
from mosaic.runtime.many_lengths import strides_in
from mosaic.runtime.mesh import get_context
from mosaic.runtime.sharded_tensor import ShardedTensor, with_whole_gradient, wrapped
from mosaic.torch_private import FakeTensor, is_linear, mark_changing, size_with, symbols_of


def mark(spec: ShardingSpec, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Let Dynamo trace a call for any length of the axis that is cut, if there are buckets."""
    if spec.buckets is None:
        return
    found = [*named_sizes(spec, function, args, kwargs)]
    lengths = {x.shape[dim] for x, dim in found}
    if len(lengths) == 1 and bucket_of(spec.buckets, *lengths) is not None:
        for x, dim in found:
            mark_changing(x, dim)


def named_sizes(
    spec: ShardingSpec, function: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Iterator[tuple[Tensor, int]]:
    """The arguments that hold the axis, and in which dim."""
    (axis,) = spec.sharded
    given = named(inspect.signature(function).bind(*args, **kwargs))
    found: list[tuple[Any, int]] = []
    for path, names in (spec.inputs or {}).items():
        if axis in names.split():
            values: list[Any] = []
            replaced(given, path_parts(path), values.append)
            found += [(x, names.split().index(str(axis))) for x in values]
    if isinstance(axis, int):
        found = [(x, axis) for x in given.values() if isinstance(x, Tensor)]
    for x, dim in found:
        is_plain = isinstance(x, Tensor) and not isinstance(x, ShardedTensor)
        if is_plain and -x.ndim <= dim < x.ndim:
            yield x, dim % x.ndim


@dataclass(frozen=True)
class Padding:
    """Of one graph: ``dims`` of its inputs (by number) that follow the length, which Dynamo calls
    ``size``; ``symbols`` are what it is made of. ``outputs`` are known when it has been planned."""

    axis: str
    bucket: Bucket
    size: torch.SymInt
    symbols: frozenset[Any]
    dims: dict[int, tuple[int, ...]]
    known: tuple[int, int]  # the argument of a call, not flattened, and its dim that has the length
    device: torch.device
    outputs: Sequence[tuple[Output, Sequence[Place]]] = ()  # at the bucket's length; their rows

    def at(self, n: int) -> Callable[[Any], int]:
        """Sizes of the graph for a length."""
        return partial(size_with, symbols=self.symbols, n=n)

    @property
    def now(self) -> int:
        """The length that the graph was traced with."""
        return int(self.size.node.hint)

    def guard(self, least: int) -> None:
        """Let Dynamo take the program for all lengths of the bucket, from ``least`` on."""
        low, high = max(self.bucket.low, least - 1), self.bucket.high
        if not (self.size > low and self.size <= high):  # asked of a symbol, this is the guard
            raise AssertionError(f"{self.now} is not in {low + 1} to {high}")

    # --- a call ----------------------------------------------------------------------------

    def length_of(self, args: Sequence[Any]) -> int:
        index, dim = self.known
        return int(args[index].shape[dim])

    def padded(self, args: Sequence[Any], n: int) -> list[Any]:
        """A call's inputs, flattened, for the program: at the bucket's length, and the length."""
        mine = list(args)
        for index, dims in self.dims.items():
            if isinstance(x := args[index], ShardedTensor):
                mine[index] = lengthened_part(x)
                continue
            for dim in dims:
                mine[index] = lengthened(mine[index], dim, self.bucket.high)
            mine[index] = mine[index].contiguous()
        return [*mine, torch.tensor(n).to(self.device, non_blocking=True)]

    def examples(self, module: fx.GraphModule, examples: Sequence[Any]) -> list[Any]:
        """What the program is compiled with: fake inputs where they are padded. ``examples`` are
        flattened, and parts where inputs are cut."""
        values, found = flattened(placeholder_values(module)), [*examples]
        size = self.at(self.bucket.high)
        for index, value in enumerate(values):
            if index in self.dims and not isinstance(value, ShardedTensor):
                found[index] = fake_of(value, [size(n) for n in value.shape])
            elif self.symbols & symbols_of(value):
                found[index] = size(value)
        first = next(x for x in values if isinstance(x, FakeTensor))
        with first.fake_mode:
            return [*found, torch.empty([], dtype=torch.int64, device=self.device)]

    def cut(self, parts: Sequence[Any], n: int) -> list[Any]:
        """A call's outputs without padding."""
        found = zip(parts, self.outputs, strict=True)
        return [self.cut_one(part, out, rows, n) for part, (out, rows) in found]

    def cut_one(self, part: Any, out: Output, rows: Sequence[Place], n: int) -> Any:
        """One output; where it stays cut, of this rank's part."""
        shape, places = [*out.shape], {place.dim: place for place in out.places}
        for row in rows:
            end, place = n + row.layout.n - self.bucket.high, places.get(row.dim)
            if place is None:
                part = shortened(part, row, end)
                continue
            rank = get_context().rank(place.mesh_axis)
            part = take_runs(part, place.layout.runs(rank, 0, end), row.dim)
            places[row.dim] = place.with_layout(place.layout.slice(0, end))
            shape[row.dim] = end
        if not places:
            return with_whole_gradient(part)
        return wrapped(part, shape, tuple(places.values()), strides_in(out.stride, shape))

    def with_outputs(
        self, module: fx.GraphModule, plan: Plan, rows: Sequence[Sequence[Place]]
    ) -> Padding:
        """When it has been planned what stays cut. Raises NotPaddedError where that holds several
        rows in one dim."""
        size, nodes = self.at(self.bucket.high), module.graph.output_node().args[0]
        found = []
        for node, cut, held in zip(nodes, plan.outputs, rows, strict=True):
            shape: tuple[int, ...] = ()
            stride: tuple[int, ...] = ()
            if cut:
                x = node.meta["example_value"]
                shape, stride = (tuple(map(size, sizes)) for sizes in (x.shape, x.stride()))
            lengths = {place.dim: {place.layout.n, place.size} for place in cut}
            if any(lengths.get(row.dim, {row.size}) != {row.layout.n} for row in held if cut):
                raise NotPaddedError("an output stays cut that has rows flattened", node)
            found.append((Output(shape, stride, cut, is_shared=False), held))
        return replace(self, outputs=found)


def fake_of(value: Any, shape: list[int]) -> Tensor:
    with value.fake_mode:
        return torch.empty(shape, dtype=value.dtype, device=value.device).requires_grad_(
            value.requires_grad
        )


def lengthened(x: Tensor, dim: int, n: int) -> Tensor:
    """``x`` with copies of its last row behind it."""
    if x.shape[dim] == n:
        return x
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    shape = [n - x.shape[d] if d == dim else size for d, size in enumerate(x.shape)]
    return torch.cat([x, last.expand(shape)], dim)


def shortened(x: Tensor, place: Place, rows: int) -> Tensor:
    """``x`` without its padding, with its dims in the order that they have in memory."""
    if rows == place.layout.n:
        return x
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    back = [order.index(d) for d in range(x.ndim)]
    if (place.outer, place.inner) == (1, 1):
        return x.narrow(place.dim, 0, rows).permute(order).contiguous().permute(back)
    before, after = x.shape[: place.dim], x.shape[place.dim + 1 :]
    apart = x.reshape(*before, place.outer, place.layout.n, place.inner, *after)
    return apart.narrow(place.dim + 1, 0, rows).flatten(place.dim, place.dim + 2)


# --- a graph ------------------------------------------------------------------------------------


def padding_of(
    module: fx.GraphModule, spec: ShardingSpec, why_not: str, of_unit: Sequence[Any] | None = None
) -> Padding:
    """How the inputs of a graph are padded, ``of_unit`` the sizes that are the length, if it is a
    unit's (``unit_lengths.py``). Raises NotPaddedError where that cannot be."""
    assert spec.buckets is not None
    if why_not:
        raise NotPaddedError(why_not)
    (axis,) = spec.sharded
    values = flattened(placeholder_values(module))
    sizes = of_unit
    if of_unit is None:
        sizes = [*axis_sizes(axis, spec, read_inputs(module), values)]
    if not sizes:
        has_none = "the graph has no input with the axis"
        raise NotPaddedError(
            has_none if of_unit is None else "inputs are cut in a way of their own"
        )
    size = sizes[0]
    if not all(other == size for other in sizes):  # asked of symbols, this makes them one
        raise NotPaddedError("its inputs have several lengths")
    if not isinstance(size, torch.SymInt) or len(symbols_of(size)) != 1:
        raise NotPaddedError(
            "the program holds for this length alone (an input without a name has it, or what the "
            "model decides by it)"
        )
    symbols = symbols_of(size)
    bucket = bucket_of(spec.buckets, int(size.node.hint))
    if bucket is None:
        raise NotPaddedError("it is longer than all buckets")
    known = next(padded_dims(placeholder_values(module), symbols))
    device = placeholder_values(module)[known[0]].device
    dims = dict(padded_dims(values, symbols))
    found = Padding(str(axis), bucket, size, symbols, dims, (known[0], known[1][0]), device)
    for node in nodes_of(module):
        if not is_linear(node.meta.get("example_value"), symbols):
            raise NotPaddedError("computes a number of the length", node)
    return found


def axis_sizes(
    axis: str | int, spec: ShardingSpec, inputs: Sequence[Input], values: Sequence[Any]
) -> Iterator[Any]:
    """The axis' size in the inputs that have it."""
    tensors = [(x, i) for x, i in zip(values, inputs, strict=True) if isinstance(x, Tensor)]
    if isinstance(axis, int):
        plain = [x.shape for x, i in tensors if not i.is_state]
        yield from (shape[axis] for shape in plain if -len(shape) <= axis < len(shape))
    for path, names in (spec.inputs or {}).items():
        for x, i in tensors:
            if axis in names.split() and binds(path, i.source):
                yield x.shape[names.split().index(str(axis))]


def unit_sizes(module: fx.GraphModule, now: int) -> list[Any]:
    """The sizes in a unit's inputs that are the length, which is ``now`` where none is cut."""
    given = placeholder_values(module)
    every = [x for x in (*flattened(given), *given) if isinstance(x, Tensor)]
    cut = [x for x in every if isinstance(x, ShardedTensor) and x.bucket is not None]
    lengths = [x.shape[place.dim] for x in cut for place in x.bucket or ()]
    known = {hint_of(size) for size in lengths} or {now}
    sizes = (size for x in every for size in x.shape)
    return [*lengths, *(n for n in sizes if symbols_of(n) and hint_of(n) in known)]


def hint_of(size: Any) -> int:
    return int(size.node.hint) if symbols_of(size) else int(size)


def padded_dims(
    values: Sequence[Any], symbols: frozenset[Any]
) -> Iterator[tuple[int, tuple[int, ...]]]:
    for index, x in enumerate(values):
        if not isinstance(x, Tensor):
            continue
        dims = tuple(d for d, n in enumerate(x.shape) if symbols & symbols_of(n))
        if any(symbols_of(x.shape[d]) != symbols or not is_symbol(x.shape[d]) for d in dims):
            raise NotPaddedError("an input has a size made of the length")
        if dims:
            yield index, dims


def is_symbol(size: Any) -> bool:
    return bool(size.node.expr.is_Symbol)


def captured_at_bucket(module: fx.GraphModule, padding: Padding) -> tuple[Captured, Length]:
    """The program at the bucket's length, with the length for a last input. Raises NotPaddedError
    where the program is another one at another length."""
    high = padding.bucket.high
    try:
        found = capture(module, padding.at(high))
        shorter = capture(module, padding.at(high - 1))
    except Exception as error:  # of any kind: the program was written for other sizes
        raise NotPaddedError(
            f"the program does not run at lengths {high} and {high - 1}: {error}"
        ) from error
    if found.checks:
        raise NotPaddedError("a BlockMask that is given has the blocks of one length")
    follows, numbers = compared(found.graph, shorter.graph)
    node = length_input(found.graph, padding.device)
    follows[node] = ((),)
    inputs = (*found.inputs, Input(len(found.inputs), "L['length']", is_state=False))
    length = Length(padding.axis, padding.bucket, padding.now, node, follows, numbers)
    return Captured(**{**vars(found), "inputs": inputs}), length


def length_input(graph: fx.Graph, device: torch.device) -> fx.Node:
    """A placeholder behind the others."""
    placeholders = graph.find_nodes(op="placeholder")
    like = next(x for n in placeholders if isinstance(x := n.meta.get("val"), FakeTensor))
    with graph.inserting_after(placeholders[-1]):
        node = graph.placeholder("length")
    with like.fake_mode:
        node.meta["val"] = torch.empty([], dtype=torch.int64, device=device)
    node.meta |= {"is_state": False, "storage_offset": 0, "requires_grad": False}
    return node
