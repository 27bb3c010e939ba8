"""A ``BlockMask`` says twice what is seen: by its ``mask_mod``, and by lists of blocks.

flex's kernels never look at blocks that its lists leave out, and take those that they call full as
they are; Mosaic reads its ``mask_mod`` alone. So the lists must say the same. Where they are made
by ``create_block_mask`` in the same program, they do, and nothing of them is left. Else they are
compared with ``mask_mod`` before the program runs on them for the first time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mosaic.api.errors import UnsupportedError
from mosaic.graph.source import where
from mosaic.runtime.sharded_tensor import whole
from mosaic.torch_private import pytree

#: How many pairs of query and key are looked at together.
PAIRS = 2**24
FIX = (
    "make the mask by create_block_mask from the mask_mod that it holds; where blocks are chosen "
    "by other means, let mask_mod say so: chosen[b, h, q_idx // 128, kv_idx // 128]"
)


class Blocks(NamedTuple):
    """What a mask's lists are of. ``text``: its mask_mod, if that says all. ``seen(from, to,
    *tensors)``: which keys those queries see, boolean (batch|1, heads|1, queries, keys).
    ``lengths``: all queries and keys; ``block``: those of a block."""

    text: str
    seen: Callable[..., Tensor]
    lengths: tuple[int, int]
    block: tuple[int, int]


@torch.library.custom_op("mosaic::block_mask", mutates_args=())
def block_mask(
    seen: Tensor,
    lists: Sequence[Tensor],
    made: Sequence[Tensor],
    buffers: Sequence[Tensor],
    number: int,
) -> Tensor:
    """``seen`` in the captured graph, beside the lists of its BlockMask, those that would be made
    of it, and what its mask_mod reads."""
    raise AssertionError("mosaic::block_mask stands for a check and is never run")


@block_mask.register_fake
def _(seen, lists, made, buffers, number):
    return torch.empty_like(seen)


# --- while compiling ------------------------------------------------------------------------------


def checks_of(graph: fx.Graph, known: Sequence[Blocks]) -> list[BlockCheck]:
    """Take the marks out of a captured graph; what has to be compared before it runs."""
    checks = []
    for node in graph.find_nodes(op="call_function", target=torch.ops.mosaic.block_mask.default):
        seen, lists, made, buffers, number = node.args
        if len(lists) != len(made) or not all(map(is_same, lists, made)):
            checks.append(check_of(graph, node, [*lists, *buffers], len(lists), known[number]))
        node.replace_all_uses_with(seen)
        graph.erase_node(node)
    graph.eliminate_dead_code(lambda n: n.is_impure(impure_random=False))
    return [check for check in checks if check.needed]


def is_same(x: Any, y: Any) -> bool:
    """Whether two nodes are made by the same ops of the same inputs."""
    todo, done = [(x, y)], set()
    while todo:
        a, b = todo.pop()
        if a is b or (a, b) in done:
            continue
        done.add((a, b))
        if not is_plain(a, b):
            return False
        (first, tree), (second, other) = flat(a), flat(b)
        if tree != other:
            return False
        todo += zip(first, second, strict=True)
    return True


def is_plain(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are the same op. Modes (autocast) have a part in those of fractions."""
    if a.op not in ("call_function", "get_attr") or (a.op, a.target) != (b.op, b.target):
        return False
    if torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ()):
        return False
    return not has_fractions(a) or a.meta.get("modes") == b.meta.get("modes")


def has_fractions(node: fx.Node) -> bool:
    vals = node.meta.get("val")
    tensors = [x for x in pytree.tree_leaves(vals) if isinstance(x, Tensor)]
    return any(x.is_floating_point() for x in tensors)


def flat(node: fx.Node) -> tuple[list[fx.Node], str]:
    """A node's operands, and the rest of its call as text."""
    operands: list[fx.Node] = []

    def place(n: fx.Node) -> str:
        operands.append(n)
        return "%"

    return operands, str(fx.node.map_arg((node.args, dict(node.kwargs)), place))


def check_of(
    graph: fx.Graph, mark: fx.Node, wanted: Sequence[fx.Node], lists: int, blocks: Blocks
) -> BlockCheck:
    """What makes the ``wanted`` tensors of the program's inputs, and compares them."""
    ways = before(wanted)
    part, copies = fx.Graph(), {}
    needed: list[int] = []
    for number, node in enumerate(graph.find_nodes(op="placeholder")):
        if node in wanted or any(user in ways for user in node.users):
            copies[node] = part.placeholder(f"x_{len(needed)}")
            needed.append(number)
    for node in graph.nodes:
        if node not in ways:
            continue
        if has_fractions(node) or sizes_of(node) > PAIRS:
            raise UnsupportedError(
                "the block lists of a BlockMask are computed in the program, by other means than "
                "create_block_mask of its mask_mod",
                where=where(mark),
                fix=f"make it outside of the compiled function, or {FIX}",
            )
        copies[node] = part.node_copy(node, copies.__getitem__)
    part.output([copies[n] for n in wanted])
    make = fx.GraphModule(graph.owning_module or torch.nn.Module(), part)
    check = BlockCheck(make, needed, lists, blocks, where(mark))
    if not needed:
        check([])
    return check


def before(wanted: Sequence[fx.Node]) -> set[fx.Node]:
    """What is computed for these nodes."""
    found: set[fx.Node] = set()
    todo = list(wanted)
    while todo:
        node = todo.pop()
        if node not in found and node.op != "placeholder":
            found.add(node)
            todo += node.all_input_nodes
    return found


def sizes_of(node: fx.Node) -> int:
    vals = pytree.tree_leaves(node.meta.get("val"))
    return max((x.numel() for x in vals if isinstance(x, Tensor)), default=0)


#: Of checks that are written alike, the tensors last looked at, and how often each was written to.
LAST: dict[str, list[tuple[Any, int]]] = {}


# --- before a run ---------------------------------------------------------------------------------


@dataclass
class BlockCheck:
    """Call it with the program's arguments. ``make``: what gives the lists, of which there are so
    many, and what mask_mod reads, of the ``needed`` ones."""

    make: fx.GraphModule
    needed: Sequence[int]
    lists: int
    blocks: Blocks
    where: str | None
    key: str = field(init=False)

    def __post_init__(self) -> None:
        texts = [self.blocks.text, self.make.code, str(self.blocks[2:])]
        has_constants = any(n.op == "get_attr" for n in self.make.graph.nodes)
        self.key = str(id(self)) if has_constants or not texts[0] else "\n".join(texts)

    def __call__(self, args: Sequence[Any]) -> None:
        """Raise UnsupportedError where the lists and mask_mod disagree; the same tensors are looked
        at once."""
        given = [args[i] for i in self.needed]
        if self.has_seen(given):
            return
        with torch.no_grad():
            found = self.make(*(whole(x) if isinstance(x, Tensor) else x for x in given))
            wrong = disagreement(found[: self.lists], found[self.lists :], self.blocks)
        if wrong is not None:
            b, h, i, j = wrong
            raise UnsupportedError(
                "a BlockMask's lists of blocks say something else than its mask_mod",
                where=self.where,
                block=f"queries from {i} on, keys from {j} on, of batch {b}, head {h}",
                reason="flex's kernels follow the lists, Mosaic follows mask_mod",
                fix=FIX,
            )
        LAST[self.key] = [(weakref.ref(x), version(x)) for x in given if isinstance(x, Tensor)]

    def has_seen(self, given: Sequence[Any]) -> bool:
        """Whether these tensors were looked at last time, maybe by another layer's check, and
        nobody wrote to them since. (Numbers of a program never change.)"""
        tensors, last = [x for x in given if isinstance(x, Tensor)], LAST.get(self.key)
        if last is None or len(tensors) != len(last):
            return False
        pairs = zip(tensors, last, strict=True)
        return all(ref() is x and n == version(x) != -1 for x, (ref, n) in pairs)


def version(x: Tensor) -> int:
    """How often it was written to; -1 where torch does not count."""
    return -1 if x.is_inference() else x._version


def disagreement(
    lists: Sequence[Tensor], buffers: Sequence[Tensor], blocks: Blocks
) -> tuple[int, int, int, int] | None:
    """Batch, head, query and key where a block begins of which lists and mask say different."""
    listed = state_of(lists)
    queries, keys = blocks.lengths
    rows, columns = (min(n, b) for n, b in zip((queries, keys), blocks.block, strict=True))
    is_long = listed.shape[2] * rows >= queries and listed.shape[3] * columns >= keys
    if is_long and bool((listed == 1).all()):
        return None  # mask_mod is asked everywhere
    step = max(1, PAIRS // (rows * keys)) * rows
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        some, every = reduced(blocks.seen(start, stop, *buffers), rows, columns)
        first = start // rows
        state = padded(listed[:, :, first : first + some.shape[2]], some.shape)
        wrong = ((state == 0) & some) | ((state == 2) & ~every)
        if bool(wrong.any()):
            b, h, i, j = wrong.nonzero()[0].tolist()
            return b, h, (first + i) * rows, j * columns
    return None


def state_of(lists: Sequence[Tensor]) -> Tensor:
    """(batch|1, heads|1, rows of blocks, columns): 0 for a block that is hidden, 1 for one that is
    seen in part, 2 for one that is seen whole."""
    counts, indices = lists[:2]
    columns = indices.shape[-1]
    state = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.int8, device=counts.device)
    for value, (count, index) in enumerate(zip(lists[::2], lists[1::2], strict=True), start=1):
        named = torch.arange(columns, device=count.device) < count[..., None]
        state.scatter_(-1, torch.where(named, index, columns).long(), value)
    return state[..., :columns]


def padded(state: Tensor, shape: Sequence[int]) -> Tensor:
    """With blocks that no list names, as many as there are in the mask."""
    missing = [max(0, n - have) for n, have in zip(shape[2:], state.shape[2:], strict=True)]
    return F.pad(state, (0, missing[1], 0, missing[0]))[:, :, : shape[2], : shape[3]]


def reduced(seen: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Whether any pair of each block is seen, and whether all are."""
    for dim in (0, 1):
        seen = seen if seen.stride(dim) else seen.narrow(dim, 0, 1)  # all batches see the same
    tail = (0, -seen.shape[3] % columns, 0, -seen.shape[2] % rows)
    some, every = (F.pad(seen, tail, value=x) for x in (False, True))
    split = [x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)) for x in (some, every)]
    return split[0].any(5).any(3), split[1].all(5).all(3)
