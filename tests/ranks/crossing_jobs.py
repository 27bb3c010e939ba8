"""Jobs for programs of many graphs: what is cut stays cut between them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from model_jobs import gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from walk import strips_of_masks, whole_activations

import mosaic
from mosaic.report.plan import plans
from mosaic.torch_private import pytree

E = 16


class Attention(nn.Module):
    def __init__(self, breaks: bool, causal: bool = True):
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.breaks, self.causal = breaks, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if self.breaks:
            torch._dynamo.graph_break()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, breaks: bool):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(E), Attention(breaks)
        self.up, self.down, self.breaks = nn.Linear(E, 2 * E), nn.Linear(2 * E, E), breaks

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Decoder(nn.Module):
    """Ids to a loss: an embedding, blocks that may break, a head."""

    def __init__(self, breaks: bool, layers: int = 3):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, E), nn.Linear(E, 11)
        self.blocks = nn.ModuleList(Block(breaks) for _ in range(layers))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def tokens(n: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n)
    return torch.randint(11, (2, n), generator=draw), torch.randint(11, (2, n), generator=draw)


def compiled(fn: Any, **spec: Any) -> Any:
    options = {"inner": "eager", "spec": mosaic.ShardingSpec(**spec)}
    return torch.compile(fn, backend="mosaic", options=options)


def decoder(p: int, how: str, breaks: bool, cut: bool = True) -> dict[str, Any]:
    """Loss, gradients and plans; ``how``: the whole is compiled, or every block, or neither.
    p = 0 is one process without Mosaic."""
    torch.manual_seed(0)
    model = Decoder(breaks).double()
    called: Callable[..., Tensor] = model
    ids, labels = tokens(13)
    if p:
        mosaic.init(sp_size=p)
        if cut:
            ids, labels = (mosaic.distribute(x, 1) for x in (ids, labels))
        if how == "whole":
            called = compiled(model)
        for block in model.blocks if how == "blocks" else ():
            block.forward = compiled(block.forward)
    with plans() as found:
        loss = called(ids, labels)
        loss.backward()
    whole = {name: full(grad) for name, grad in gradients(model).items()}
    return {
        "loss": full(loss.detach()),
        "gradients": whole,
        "graphs": len(found),
        "gathered": [line for plan in found for line in plan.gathered],
        "axes": [plan.axis for plan in found],
        "whole": whole_activations(found, 13) if p > 1 and cut else [],
    }


def full(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, mosaic.ShardedTensor) else x


# --- what users do in between -------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum((0, 1))


def users_function(x: Tensor, block: nn.Module) -> Tensor:
    return Scaled.apply(block(x), block.norm.weight)


def checkpointed(x: Tensor, block: nn.Module) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def checkpointed_reentrant(x: Tensor, block: nn.Module) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)


def offloaded(x: Tensor, block: nn.Module) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return block(x) * x


def saved_by_hooks(x: Tensor, block: nn.Module) -> Tensor:
    kept: list[Tensor] = []

    def pack(saved: Tensor) -> int:
        kept.append(saved)
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, kept.__getitem__):
        return block(x).sin() * x


def hooked(x: Tensor, block: nn.Module) -> Tensor:
    y = block(x)
    y.register_hook(lambda grad: grad * 2)
    return y * 1.0


def module_hooks(x: Tensor, block: nn.Module) -> Tensor:
    handles = [
        block.register_forward_hook(lambda module, args, out: out + args[0]),
        block.register_full_backward_hook(lambda module, before, after: (before[0] * 3,)),
    ]
    y = block(x)
    for handle in handles:
        handle.remove()
    return y


def in_trees(x: Tensor, block: nn.Module) -> Tensor:
    tree = {"a": [x, (x * 2,)], "b": None}
    flat, spec = pytree.tree_flatten(tree)
    again = pytree.tree_unflatten([f if f is None else f + 1 for f in flat], spec)
    return block(again["a"][1][0]) + again["a"][0]


def copied(x: Tensor, block: nn.Module) -> Tensor:
    other = copy.deepcopy(x.detach())
    return block(x) + other.mul_(2)


def converted(x: Tensor, block: nn.Module) -> Tensor:
    y = block(x).to(torch.float32).to("cpu", torch.float64)
    return y.double().type_as(x).contiguous()


def autocast(x: Tensor, block: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return block(x.float() * 0.1)


def without_gradients(x: Tensor, block: nn.Module) -> Tensor:
    with torch.no_grad():
        y = block(x)
    return y + x


def saved_to_a_file(x: Tensor, block: nn.Module) -> Tensor:
    file = io.BytesIO()
    torch.save({"y": block(x).detach()}, file)
    file.seek(0)
    return torch.load(file)["y"] + x


def read_in_python(x: Tensor, block: nn.Module) -> Tensor:
    y = block(x).detach()
    numbers = torch.tensor(y.tolist(), dtype=torch.float64)
    return x + numbers + torch.from_numpy(y.numpy()) + float(y.max()) + y[0, 5, 3].item()


def views(x: Tensor, block: nn.Module) -> Tensor:
    """Views of what is cut go into a compiled function."""
    y = block(x[:, 2:11]) + block((x * 2).transpose(0, 1).transpose(0, 1))[:, 2:11]
    return y + block(x.view(2, 13, 4, 4).flatten(2)).narrow(1, 0, 9)


def compared(x: Tensor, block: nn.Module) -> Tensor:
    y = block(x)
    if bool((y > 100).any()) or not torch.isfinite(y).all():
        y = y * 0
    return y.clamp(min=-1) if y.abs().mean() > 0 else y


def in_place(x: Tensor, block: nn.Module) -> Tensor:
    y = x * 1
    y += block(x)
    y.mul_(2).add_(x)
    return y.relu_()


def looped(x: Tensor, block: nn.Module) -> Tensor:
    """Rows one by one, as some write it."""
    return torch.stack([row * i for i, row in enumerate(block(x).unbind(1))], 1)


def buffered(x: Tensor, block: nn.Module) -> Tensor:
    """A compiled function writes into what it is given."""
    state = torch.zeros_like(x.detach())
    step = compiled_or_not(written, x)
    for _ in range(2):
        y = step(x, state)
    return y + state


def written(x: Tensor, state: Tensor) -> Tensor:
    state.add_(x.detach()).mul_(2)
    return x * state.mean()


def compiled_or_not(fn: Callable[..., Tensor], x: Tensor) -> Callable[..., Tensor]:
    return compiled(fn) if isinstance(x, mosaic.ShardedTensor) else fn


USES = {
    fn.__name__: fn
    for fn in (
        users_function, checkpointed, checkpointed_reentrant, offloaded, saved_by_hooks, hooked,
        module_hooks, in_trees, copied, converted, autocast, without_gradients, saved_to_a_file,
        read_in_python, views, compared, in_place, looped, buffered,
    )
}  # fmt: skip


def used(p: int, name: str) -> list[Tensor]:
    """The result, and the gradients of the input and of the block's parameters."""
    torch.manual_seed(0)
    dtype = torch.float32 if name == "autocast" else torch.float64
    block, leaf = Block(False).to(dtype), torch.randn(2, 13, E, dtype=torch.float64)
    leaf.requires_grad_()
    x: Tensor = leaf
    if p:
        mosaic.init(sp_size=p)
        block.forward = compiled(block.forward)
        x = mosaic.distribute(leaf, 1)
    y = USES[name](x, block)
    y.square().mean().backward()
    params = [w.grad for w in block.parameters() if w.grad is not None]
    return [full(one) for one in (y.detach(), leaf.grad, *params)]


# --- masks --------------------------------------------------------------------------------------


def causal(ids: Tensor, n: int) -> Tensor:
    return torch.arange(n)[None] <= torch.arange(n)[:, None]


def documents(ids: Tensor, n: int) -> Tensor:
    return causal(ids, n) & (ids[:, None, :, None] // 4 == ids[:, None, None, :] // 4)


def padded(ids: Tensor, n: int) -> Tensor:
    return causal(ids, n) & (ids != 3)[:, None, None]


def added(ids: Tensor, n: int) -> Tensor:
    return torch.where(causal(ids, n), 0.0, -torch.inf).double()


def triangle(ids: Tensor, n: int) -> Tensor:
    return torch.triu(torch.full((n, n), -torch.inf, dtype=torch.float64), 1)


def learned(ids: Tensor, n: int) -> Tensor:
    """Numbers, and no pattern: it stays a tensor."""
    return causal(ids, n) & (ids.double().cos()[:, None, :, None].cumsum(2) < 5)


MASKS = {fn.__name__: fn for fn in (causal, documents, padded, added, triangle, learned)}


class Masked(nn.Module):
    """A mask is made before the first break, used behind it by two blocks, and given."""

    def __init__(self, kind: str):
        super().__init__()
        self.embed, self.mask = nn.Embedding(11, E), MASKS[kind]
        self.blocks = nn.ModuleList(nn.Linear(E, 3 * E) for _ in range(2))

    def attended(self, x: Tensor, layer: nn.Module, mask: Tensor) -> Tensor:
        x = F.layer_norm(x, (E,))
        torch._dynamo.graph_break()
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in layer(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        torch._dynamo.graph_break()
        return x * 2

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        mask, x = self.mask(ids, ids.shape[1]), self.embed(ids)
        x = self.attended(x, self.blocks[0], mask)
        return self.attended(x, self.blocks[1], mask).square().mean(), mask


def masks(p: int, kind: str) -> dict[str, Any]:
    """Loss, gradients, the mask that is given, and what was planned."""
    torch.manual_seed(0)
    model, ids = Masked(kind).double(), tokens(13)[0]
    ids[:, 0] = 1  # a row that sees no key would be NaN
    called: Callable[..., tuple[Tensor, Tensor]] = model
    if p:
        mosaic.init(sp_size=p)
        called = compiled(model, inputs={"ids": "batch tokens"}, axes={"tokens": "ring"})
    with plans() as found:
        loss, mask = called(ids)
        loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": gradients(model),
        "mask": mask,
        "words": {a.mask for plan in found for a in plan.attentions},
        "strips": strips_of_masks(found, 13, p or 1),
    }
