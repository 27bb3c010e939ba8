"""Programs that a capture could lose something of: each is compared with eager, gradients too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import Built
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

N, E = 13, 8


class Attention(nn.Module):
    def __init__(self, heads: int = 2):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(E, 3 * E), nn.Linear(E, E), heads

    def forward(self, x: Tensor) -> Tensor:
        b, n, e = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, e // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, e))


class WrongButTheUsers(torch.autograd.Function):
    """A backward that is not the derivative of forward: only the user's gives these gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, w = ctx.saved_tensors
        return 3 * grad * w, 5 * (grad * x).sum((0, 1))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), nn.Sequential(nn.Linear(E, E), nn.Tanh())

    def block(self, x: Tensor) -> Tensor:
        return x + self.mlp(x + self.attention(x))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, x, use_reentrant=False)
        return checkpoint(self.block, x, use_reentrant=False).square().mean()


class UserFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.w = Attention(), nn.Parameter(torch.randn(E))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return (WrongButTheUsers.apply(x, self.w) + x).square().mean()


class WholeFunction(UserFunction):
    """The user's function is on parameters alone: every rank does the same."""

    def forward(self, x: Tensor) -> Tensor:
        scaled = WrongButTheUsers.apply(self.w.expand(1, 1, E), self.w)
        return (x * scaled + self.attention(x)).square().mean()


class InnerAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.a, self.b = Attention(), nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(x)
            with torch.autocast("cpu", enabled=False):
                z = self.b(y.float())
        return (z + y).float().square().mean()


class NoGradBlocks(nn.Module):
    """A whole and a sharded value made without gradients, used with them; detach and ``.data``."""

    def __init__(self):
        super().__init__()
        self.attention, self.w = Attention(), nn.Linear(E, E)
        self.table = nn.Parameter(torch.randn(N, E))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        with torch.no_grad():
            scale = x.abs().mean(dim=1, keepdim=True)
            frozen = self.table * 2
        y = x / scale + frozen + self.table
        return (y * self.w(y).detach() + self.w(x) * self.w(y).data).square().mean()


class Mapped(nn.Module):
    """vmap over samples, over tokens, over both positions of a mask, and in a checkpoint."""

    def __init__(self):
        super().__init__()
        self.attention, self.w = Attention(), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        seen = torch.vmap(torch.vmap(near, (None, 0)), (0, None))(positions, positions)
        x = torch.vmap(self.token, in_dims=1, out_dims=1)(x)
        x = x + F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3, seen).squeeze(1)
        x = x + self.attention(checkpoint(torch.vmap(self.sample), x, use_reentrant=False))
        return x.square().mean()

    def token(self, x: Tensor) -> Tensor:
        """(batch, features) of one token."""
        x = x.clone()
        x[:, 3] = x[:, [1, 2]].sum(1)
        return F.layer_norm(self.w(x), (E,)).mul_(2)

    def sample(self, x: Tensor) -> Tensor:
        """(tokens, features) of one sample; its mean is over the axis that is cut."""
        scale, shift = torch.vmap(lambda row: (row.sigmoid(), row.mean()))(x)
        return x * scale + shift[:, None] - x.mean(0)


def near(query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query - 5)


class Buffers(nn.Module):
    """BatchNorm over the tokens, a counter, and a running sum that the user keeps."""

    def __init__(self):
        super().__init__()
        self.attention, self.norm = Attention(), nn.BatchNorm1d(E)
        self.register_buffer("seen", torch.zeros(E))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        self.seen += x.detach().square().sum((0, 1))
        self.calls += 1
        return x.pow(3).mean()


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.w = Attention(), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        y = self.w(x).clone()
        y[:, 3] = 0
        y[:, 5:8] = y[:, 5:8] * 2
        y[..., 1] = x[..., 0]
        y.mul_(x)
        return y.square().mean()


class Reductions(nn.Module):
    """Everything a mean can be over the axis."""

    def __init__(self):
        super().__init__()
        self.attention, self.w = Attention(), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        y = self.w(x)
        parts = [
            y.mean(1), y.sum(1), y.std(1), y.var(1, unbiased=False), y.amax(1), y.amin((1, 2)),
            y.logsumexp(1), y.softmax(1).square().sum(1), y.log_softmax(1)[:, 2], y[:, -1],
            y[:, 4:9].sum(1), torch.roll(y, 2, 1)[:, 0], F.pad(y, (0, 0, 2, 1))[:, 3],
            y.cumsum(1)[:, 7], y.flip(1)[:, 2],
        ]  # fmt: skip
        return sum((p * (i + 1)).square().mean() for i, p in enumerate(parts))


class Mean(nn.Module):
    """Compiled soon: for tests of what is around the program."""

    def __init__(self):
        super().__init__()
        self.attention, self.w = Attention(), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x + self.attention(x)).square().mean()


class GraphBreak(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        torch._dynamo.graph_break()
        return (x + self.second(x)).square().mean()


def built(kind: type[nn.Module], dtype: torch.dtype = torch.float64, n: int = N) -> Built:
    model = kind().to(dtype)
    return model, (torch.randn(2, n, E, dtype=dtype, requires_grad=True),), {}


class EqualOnOneRank(nn.Module):
    """Rows that a rank has none of, and slices that are the same rows on a rank: calls that are
    equal there, and differ on others."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)
        rows = y[:, 0] + 2 * y[:, 1] + 3 * y[:, -2] + 4 * y[:, -1]
        starts = (y[:, :5].mean(1), 2 * y[:, :6].mean(1), y[:, :-5].std(1), 3 * y[:, :-6].std(1))
        return (rows * sum(starts)).square().mean()


class TwoLayers(nn.Module):
    """Two equal attentions, of which the graphs differ in nothing but what they read."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


class Recurrence(nn.Module):
    """One step after another along the axis."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        y, h = self.attention(x), torch.zeros_like(x[:, 0])
        states = []
        for t in range(x.shape[1]):
            h = torch.tanh(h + y[:, t])
            states.append(h)
        return torch.stack(states, 1).square().mean()


class ZeroGradient(nn.Module):
    """The sign's gradient is zeros that depend on no tangent, and is summed across the ranks."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x.cos(), is_causal=True)
        y = torch.copysign(y, x[..., None, :])
        y = F.pad(y.movedim(2, -1), (1, 1, 0, 0), mode="replicate").movedim(-1, 2)
        return y.square().mean()


def zero_gradient() -> Built:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 6, dtype=torch.float64, requires_grad=True)
    return ZeroGradient(), (x,), {}


class Encoder(nn.Module):
    """In eval mode without gradients torch takes a fused path that hides the attention."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, 2, 16, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(E, 2, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.attention(x, x, x)[0].square().mean()


class AnyLength(nn.Module):
    """Right at any length, so that it can be traced on a shard and again at the whole length."""

    def __init__(self):
        super().__init__()
        self.attention, self.w = Attention(), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        b, n, e = x.shape
        positions = torch.arange(n, device=x.device) / n
        x = x + self.attention(x) + positions[:, None]
        y = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
        steps = self.w(y[:, 1:] - y[:, :-1]).reshape(b * (n - 1), e)
        return steps.square().sum() / n + y[:, -1].pow(3).mean()
