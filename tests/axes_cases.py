"""Models with two axes to cut: tables of (batch, rows, columns, features), small, float64."""

from __future__ import annotations

from functools import partial

import cases
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

E, HEADS = 8, 2


class Attention(nn.Module):
    """Self attention over dim -2 of (..., n, E)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
    ) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return self.out(y.transpose(-3, -2).flatten(-2))

    def attend(self, x: Tensor, to: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of all of x over another table's rows."""
        y = F.scaled_dot_product_attention(self.heads(x)[0], *self.heads(to)[1:], mask)
        return self.out(y.transpose(-3, -2).flatten(-2))

    def heads(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-3, -2)


class Cells(nn.Module):
    """A table whose cells become vectors; subclasses say what happens then."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, E)
        self.first, self.second = Attention(), Attention()
        self.norm = nn.LayerNorm(E)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(self.embed(x.unsqueeze(-1))).square().mean()

    def cells(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Flattened(Cells):
    """One attention over all cells."""

    causal = False
    masked = False

    def cells(self, x: Tensor) -> Tensor:
        b, r, c, _ = x.shape
        flat = x.reshape(b, r * c, E)
        at = torch.arange(r * c)
        near = (at[:, None] - at[None, :]).abs() <= 2 * c if self.masked else None
        y = self.first(flat, near, self.causal) + flat
        return self.norm(y).reshape(b, r, c, E) * x


class FlattenedCausal(Flattened):
    causal = True


class FlattenedMasked(Flattened):
    masked = True


class ManyRows(FlattenedCausal):
    """Each rank holds a piece of every row: too many for a causal mask."""

    def cells(self, x: Tensor) -> Tensor:
        return super().cells(x + self.second(x))


class InTurn(Cells):
    """Attention over columns, then over rows: both axes are cut, each on a mesh axis of its own."""

    def cells(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.first(x))
        x = x.transpose(1, 2)
        x = self.norm(x + self.second(x))
        return x.transpose(1, 2)


class InTurnFlat(Cells):
    """The same in the way of nanoTabPFN: the other axis is folded into the batch."""

    def cells(self, x: Tensor) -> Tensor:
        b, r, c, e = x.shape
        x = self.norm(x.reshape(b * r, c, e) + self.first(x.reshape(b * r, c, e)))
        x = x.reshape(b, r, c, e).transpose(1, 2).reshape(b * c, r, e)
        x = self.norm(x + self.second(x)).reshape(b, c, r, e).transpose(1, 2)
        return x * x.mean(dim=(1, 2), keepdim=True) / (1 + x.var(dim=2, keepdim=True))


class Training(Cells):
    """Rows after a split look at the rows before it only: most ranks hold none of these. A learned
    bias between columns, a mask between rows, dropout in both and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(5, 5))

    def cells(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.first(x, self.bias))
        x = x.transpose(1, 2)
        train, test = x[:, :, :2], x[:, :, 2:]
        rows = self.second.attend(x, train)
        x = self.norm(x + rows) + torch.cat([train, self.second(test)], 2)
        return x.transpose(1, 2).flatten(1, 2).flatten(0, 1)


class Dropped(Cells):
    """Dropout of activations and in both attentions, the same on any number of ranks."""

    dropout = 0.5

    def cells(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = F.dropout(x + self.second(x, dropout=self.dropout), self.dropout)
        x = x.transpose(1, 2)
        return x + self.first(F.relu(x), dropout=self.dropout)


class Latents(Cells):
    """Perceiver: learned latents attend to all cells, whose axes are cut; they stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, E))
        self.bias = nn.Parameter(torch.randn(3, 1))

    def cells(self, x: Tensor) -> Tensor:
        cells = (x * x.sigmoid()).flatten(1, 2)
        latents = self.second(self.latents.expand(len(x), 3, E))
        seen = self.norm(self.first.attend(latents, cells, self.bias.expand(3, cells.shape[1])))
        return self.first.attend(cells, seen) * cells


class Structured(Cells):
    """A window and a learned bias between columns, a causal one by distance between rows."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.randn(HEADS, 1, 1))
        self.table = nn.Parameter(torch.randn(HEADS, 20))

    def cells(self, x: Tensor) -> Tensor:
        columns, rows = (torch.arange(n) - torch.arange(n)[:, None] for n in x.shape[2:0:-1])
        near = (self.slope * columns).masked_fill(columns.abs() > 2, -torch.inf)
        x = self.norm(x + self.first(x, near)).transpose(1, 2)
        before = self.table[:, rows + 10].masked_fill(rows > 0, -torch.inf)
        return self.norm(x + self.second(x, before)).transpose(1, 2)


class FlattenedStructured(Structured):
    """Over all cells, of three rows each (documents), with a bias by distance."""

    def cells(self, x: Tensor) -> Tensor:
        b, r, c, _ = x.shape
        at = torch.arange(r * c)
        rows = at // (3 * c)
        bias = self.slope * (at - at[:, None]).abs()
        mask = bias.masked_fill(rows != rows[:, None], -torch.inf)
        flat = x.reshape(b, r * c, E)
        return self.norm(flat + self.first(flat, mask)).reshape(b, r, c, E) * x


class Video(nn.Module):
    """(batch, times, rows, columns): attention over time, over each image, and over each row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, E)
        self.time, self.image, self.row = Attention(), Attention(), Attention()
        self.norm = nn.LayerNorm(E)
        self.clock = nn.Parameter(torch.randn(6, 1, 1, E))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unsqueeze(-1)) + self.clock[: x.shape[1]]
        x = self.norm(x + self.time(x.movedim(1, 3), causal=True).movedim(3, 1))
        x = x + self.image(x.flatten(2, 3)).unflatten(2, x.shape[2:4])
        x = x + self.row(x) - x.mean(dim=(1, 2, 3), keepdim=True)
        return (x * x.amax(dim=(1, 3), keepdim=True)).square().mean()


class Volume(Video):
    """One attention over all three, flattened."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unsqueeze(-1))
        flat = x.flatten(1, 3)
        return (self.norm(flat + self.image(flat)).view_as(x) * x).square().mean()


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


class Everything(Cells):
    """What meets along rows, along columns and along both; batch statistics; a class column."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(E)
        self.column = nn.Parameter(torch.randn(1, 1, 1, E))
        self.places = nn.Parameter(torch.randn(7, 1, E))

    def cells(self, x: Tensor) -> Tensor:
        b, r, c, e = x.shape
        x = torch.cat([self.column.expand(b, r, 1, e), x + self.places[:r]], 2)
        x = x + self.first(x)
        x = self.batch_norm(x.reshape(-1, e)).reshape(b, r, c + 1, e)
        x = x + checkpoint(self.between_rows, x, use_reentrant=False)
        x = x - x.amax(dim=(1, 2), keepdim=True) + x.logsumexp(1, keepdim=True)
        x = x.softmax(2) + F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1] / x.std(dim=1, keepdim=True)
        x = self.user(x)
        return x[:, 1:] * x[:, :-1] + x[:, :, :1].mean(dim=1, keepdim=True)

    def between_rows(self, x: Tensor) -> Tensor:
        return self.second(x.transpose(1, 2)).transpose(1, 2)

    def user(self, x: Tensor) -> Tensor:
        return x


class Along(Cells):
    """What works along an axis: windows, scans, lookups, writes, ends, the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.window = nn.Conv2d(E, E, 3, padding=1)

    def cells(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.second(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.window(x.movedim(-1, 1)).movedim(1, -1)
        x = x + x.cumsum(1) / 7 - x.flip(2) * x.flip(1)
        x = F.layer_norm(x, x.shape[2:]) + x.norm(dim=1, keepdim=True) + x.max(2, keepdim=True)[0]
        x = x.index_add(1, torch.tensor([0, 6]), x[:, [2, -1]])
        x = F.pad(x, (0, 0, 1, 2), mode="replicate").unfold(2, 4, 1).mean(-1)
        return x + F.avg_pool2d(x.movedim(-1, 1), 3, 1, 1).movedim(1, -1)


class UsersFunction(Everything):
    def user(self, x: Tensor) -> Tensor:
        return Swish.apply(x)


class Tokens(nn.Module):
    """A table of words: an embedding, labels of which some are ignored, a loss inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, E), nn.Linear(E, 11)
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        known = x > 2
        cells = self.embed(x) + torch.arange(x.shape[2])[:, None] / 7
        cells = self.first(cells, known[:, :, None, None, :]).transpose(1, 2)
        cells = self.second(cells, causal=True).transpose(1, 2)
        logits = self.head(cells)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 2), labels[:, 1:].flatten())


def tokens() -> Built:
    x = torch.randint(0, 11, (2, 7, 5))
    x[..., 0] = 5  # every row has a word that is known
    labels = torch.where(x > 8, -100, x)
    return Tokens().double(), (x, labels), {}


Built = tuple[nn.Module, tuple[Tensor, ...], dict]


def table() -> Built:
    model, (x, y, split), _ = cases.table(rows=13, split=3)
    return model, (x.requires_grad_(), y), {"split": split}


def built(kind: type[Cells], rows: int = 7, columns: int = 5) -> Built:
    model = kind().double()
    return model, (torch.randn(2, rows, columns).double().requires_grad_(),), {}


KINDS: tuple[type[Cells], ...] = (
    Flattened, FlattenedCausal, FlattenedMasked, InTurn, InTurnFlat, Training, Dropped, Latents,
    Everything, UsersFunction, Structured, FlattenedStructured,
)  # fmt: skip


def video(kind: type[Video]) -> Built:
    return kind().double(), (torch.randn(2, 3, 4, 5).double().requires_grad_(),), {}


CASES = {
    "Video": partial(video, Video),
    "Volume": partial(video, Volume),
    "table": table,
    "tokens": tokens,
    "ManyRows": partial(built, ManyRows, rows=12),
    "Along": partial(built, Along, columns=6),
    **{kind.__name__: partial(built, kind) for kind in KINDS},
}
