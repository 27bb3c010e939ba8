"""Random attentions: what attends to what, along which dim, under which mask, written how."""

from __future__ import annotations

from fuzz.draw import Draw
from fuzz.holes import Filler, UnfillableError
from fuzz.program import Step
from fuzz.scope import Scope, is_float

#: Masks of positions, i of queries and j of keys.
POSITIONS = (
    "i >= j",
    "j <= i + 1",
    "(i - j).abs() <= 2",
    "(i >= j) & (i - j < 3)",
    "(i < j) | (i == j)",
    "i // 3 == j // 3",
    "(i >= j) & (i // 4 == j // 4)",
    "(j < 2) | (i >= j)",
    "i % 2 == j % 2",
    "(i + j) % 3 != 1",
    "~(j > i)",
    "(j >= 1).expand({q}, {k}) | (i == j)",
    "torch.ones({q}, {k}, dtype=torch.bool).tril({s})",
    "torch.ones({q}, {k}).triu({s}) == 0",
    "(i.float() - j.float()) >= -0.5",
    "torch.where(i >= j, True, False)",
    "i != j + 1",
)
#: Masks of data, of queries (b, q, 1) and keys (b, 1, k).
DATA = (
    "({keys} > 0)[:, None, :]",
    "({queries} == {keys})[:, :, None].expand(-1, -1, {k}) | True",
    "{keys}.bool()[:, None, :].expand(-1, {q}, -1)",
    "({queries}[:, :, None] == {keys}[:, None, :])",
    "({queries}.cumsum(1)[:, :, None] == {queries}.cumsum(1)[:, None, :])",
    "({queries}[:, :, None] >= {keys}[:, None, :])",
    "{lengths}.view(-1, 1, 1) > j",
)
BIASES = (
    "-(i - j).abs() * 0.1",
    "{w:7}[(i - j).clamp(-3, 3) + 3]",
    "{w:q,k}",
    "torch.where({bool}, 0.0, float('-inf'))",
    "torch.zeros({q}, {k}).masked_fill(~({bool}), float('-inf'))",
    "torch.zeros({q}, {k}).masked_fill(~({bool}), -1e9)",
    "(1.0 - ({bool}).double()) * -1e9",
    "torch.full(({q}, {k}), float('-inf')).triu(1)",
    "torch.randn_like({w:q,k}) * 0 + (i - j) * 0.05",
    "torch.where({bool}, -(i - j).abs() * 0.2, torch.finfo(torch.float64).min)",
)
SCALES = ("", "", ", scale=0.5", ", scale=1.0", ", scale=-0.3", ", scale=0.0")
HANDWRITTEN = (
    "(({q} @ {k}.mT) * {scale}{mask}).softmax(-1) @ {v}",
    "torch.softmax({q} @ {k}.transpose(-2, -1) / {k}.shape[-1] ** 0.5{mask}, dim=-1) @ {v}",
    "torch.einsum('...qk,...kd->...qd', F.softmax(torch.einsum('...qd,...kd->...qk', {q}, {k})"
    "{mask}, -1), {v})",
    "torch.matmul(F.softmax(torch.matmul({q} * {scale}, {k}.mT){mask}, -1, dtype=torch.float64)"
    ", {v})",
    "({q} @ {k}.mT){hard}.softmax(-1) @ {v}",
    "({q} @ {k}.mT * {scale}){hard}.softmax(-1){hard0} @ {v}",
)
#: Attentions of other kinds, which Mosaic does not know: they stay whole.
OTHERS = (
    "(lambda s: (s - s.amax(-1, keepdim=True)).exp() / (s - s.amax(-1, keepdim=True)).exp()"
    ".sum(-1, keepdim=True))({q} @ {k}.mT * {scale}{mask}) @ {v}",
    "({q} @ {k}.mT * {scale}{mask}).log_softmax(-1).exp() @ {v}",
    "({q} @ {k}.mT * {scale}{mask}).sigmoid() @ {v} / {v}.shape[-2]",
    "(torch.tanh({q} @ {k}.mT * {scale}) * 2{mask}).softmax(-1) @ {v}",
    "({q} @ {k}.mT * {scale}{mask}).softmax(-2) @ {v}",
)
LIBRARY = (
    "{mod:nn.MultiheadAttention(E, 1, batch_first=True)}({x3}, {x3}, {x3}, need_weights={flag})[0]",
    "{mod:nn.MultiheadAttention(E, 2, batch_first=True)}({x3}, {x3}, {x3})[0]",
    "{mod:nn.MultiheadAttention(E, 2)}({x3}, {x3}, {x3}, need_weights=False)[0]",
    "{mod:nn.MultiheadAttention(E, 2, batch_first=True)}({x3}, {x3}, {x3}, attn_mask=torch.ones("
    "{x3}.shape[1], {x3}.shape[1], dtype=torch.bool).triu(1))[0]",
    "{mod:nn.MultiheadAttention(E, 2, batch_first=True)}({x3}, {x3}, {x3}, key_padding_mask="
    "({ids:B,C;3} == 0))[0].nan_to_num()",
    "{mod:nn.MultiheadAttention(E, 2, batch_first=True)}({x3}, {y}, {y}, "
    "average_attn_weights=False)[1]",
    "{mod:nn.TransformerEncoderLayer(E, 2, 8, dropout=0.0, batch_first=True)}({x3})",
    "{mod:nn.TransformerEncoderLayer(E, 1, 8, dropout=0.0, batch_first=True, norm_first=True)}"
    "({x3}, src_mask=nn.Transformer.generate_square_subsequent_mask({x3}.shape[1]))",
    "{mod:nn.TransformerDecoderLayer(E, 2, 8, dropout=0.0, batch_first=True)}({x3}, {y})",
)


def attention_step(scope: Scope, subject: str | None = None) -> tuple[Step, str] | None:
    """One attention over some dim of a value (of ``subject``, over the axis, where given)."""
    draw = scope.draw
    if subject is None and draw.chance(15):
        filler = Filler(scope)
        text = filler.fill(draw.choice(LIBRARY))
        name = scope.fresh("v")
        lines = (f"{name} = {text}",)
        return Step(tuple(filler.setup), tuple(filler.inputs), lines), name
    subject = subject or scope.pick(lambda t: is_float(t) and 2 <= t.ndim <= 4)
    if subject is None:
        return None
    try:
        return Writer(scope, draw, subject).step()
    except UnfillableError:
        return None


class Writer:
    """Writes the lines of one attention."""

    def __init__(self, scope: Scope, draw: Draw, subject: str):
        self.scope, self.draw, self.subject = scope, draw, subject
        self.filler = Filler(scope, subject=subject)
        self.filler.value = scope.values[subject]
        self.filler.shape = self.filler.value.shape
        self.lines: list[str] = []

    def bind(self, letter: str, text: str) -> str:
        name = self.scope.fresh(letter)
        self.lines.append(f"{name} = {text}")
        return name

    def step(self) -> tuple[Step, str]:
        shape = list(self.filler.shape)
        axis = self.axis(shape)
        moved = axis != len(shape) - 2
        x = self.subject
        if moved:
            x = self.bind("t", f"{x}.transpose({axis}, -2)")
            shape[axis], shape[-2] = shape[-2], shape[axis]
        features = shape[-1]
        heads = self.draw.choice([h for h in (1, 2, 3, 4) if features % h == 0])
        split = heads > 1 and self.draw.chance(70)
        if not split:
            heads = 1
        q, k, v, n, m = self.operands(x, shape, heads, split)
        out = self.attend(q, k, v, n, m, shape, split)
        if split:
            out = self.bind("o", f"{out}.transpose(-3, -2).flatten(-2)")
        if self.draw.chance(25):
            out = f"{out} @ {self.filler.hole_w(f'{features}, {features}')}"
        if moved:
            out = f"({out}).transpose({axis}, -2)"
        if n == shape[-2] and self.draw.chance(30):
            out = f"{self.subject} + {out}"
        name = self.bind("v", out)
        return Step(tuple(self.filler.setup), tuple(self.filler.inputs), tuple(self.lines)), name

    def axis(self, shape: list[int]) -> int:
        axes = [d for d in range(len(shape) - 1) if shape[d] == self.scope.axis]
        if axes and (not self.scope.attended or self.draw.chance(70)):
            return axes[-1]
        return self.draw.integer(0, len(shape) - 2)

    def operands(self, x: str, shape: list[int], heads: int, split: bool):
        """Queries, keys, values, and how many queries and keys there are."""
        features, n = shape[-1], shape[-2]
        other, m = x, n
        queries = x
        if self.draw.chance(15):
            kept = self.draw.integer(1, n)
            queries, n = self.draw.choice(
                ((f"{x}[..., {n - kept}:, :]", kept), (f"{x}[..., :{kept}, :]", kept))
            )
        elif self.draw.chance(10):
            n = 3
            queries = f"{self.filler.hole_w(f'3, {features}')}.expand(*{x}.shape[:-2], -1, -1)"
        if self.draw.chance(15):
            kept = self.draw.integer(1, m)
            other, m = self.draw.choice(
                (
                    (f"{x}[..., :{kept}, :]", kept),
                    (f"torch.cat([{x}, {x}[..., :{kept}, :].sin()], -2)", m + kept),
                    (f"{x}[..., ::2, :]", (m + 1) // 2),
                )
            )
        if self.draw.chance(45):
            w = [self.filler.hole_w(f"{features}, {features}") for _ in range(3)]
            texts = [f"{queries} @ {w[0]}", f"{other} @ {w[1]}", f"{other} @ {w[2]}"]
        else:
            post = self.draw.choice(
                ((".sin()", ".cos()"), ("", ""), ("", " * 2"), (".flip(-1)", ""))
            )
            texts = [queries, f"{other}{post[0]}", f"{other}{post[1]}"]
        kv = heads
        if split:
            kv = (
                self.draw.choice([h for h in range(1, heads + 1) if heads % h == 0])
                if self.draw.chance(25)
                else heads
            )
            d = features // heads
            texts = [f"({t}).unflatten(-1, ({heads}, {d})).transpose(-3, -2)" for t in texts]
            if kv < heads:
                texts[1:] = [f"{t}[..., :{kv}, :, :]" for t in texts[1:]]
        self.grouped = kv < heads
        names = [self.bind(letter, text) for letter, text in zip("qkv", texts, strict=True)]
        if self.grouped and self.draw.chance(50):
            names[1:] = [f"{name}.repeat_interleave({heads // kv}, -3)" for name in names[1:]]
            self.grouped = False
        return *names, n, m

    def attend(self, q: str, k: str, v: str, n: int, m: int, shape: list[int], split: bool) -> str:
        kind = self.draw.choice(("plain", "causal", "bool", "bool", "float"))
        if self.draw.chance(60) or self.grouped:
            options = self.draw.choice(SCALES)
            if self.grouped:
                options += ", enable_gqa=True"
            if kind == "causal":
                return f"F.scaled_dot_product_attention({q}, {k}, {v}, is_causal=True{options})"
            mask = "" if kind == "plain" else f", attn_mask={self.mask(kind, n, m, shape, split)}"
            return self.bind("o", f"F.scaled_dot_product_attention({q}, {k}, {v}{mask}{options})")
        other = self.scope.attended and self.draw.chance(30)
        template = self.draw.choice(OTHERS if other else HANDWRITTEN)
        words = {"q": q, "k": k, "v": v, "scale": self.draw.choice(("0.5", "1.0", "0.3"))}
        added = "" if kind == "plain" else f" + {self.mask('float', n, m, shape, split)}"
        allowed = self.mask("bool", n, m, shape, split)
        fill = self.draw.choice(("-1e9", "float('-inf')", "torch.finfo(torch.float64).min", "-1e4"))
        words |= {"mask": added, "hard": f".masked_fill(~({allowed}), {fill})"}
        words["hard0"] = f".masked_fill(~({allowed}), 0.0)"
        return self.bind("o", template.format(**words))

    def mask(self, kind: str, n: int, m: int, shape: list[int], split: bool) -> str:
        """An expression of a mask of (n, m), or of one that has batch dims too."""
        extra = len(shape) - 2 + split
        batched = extra > 0 and shape[0] > 0 and self.draw.chance(40)
        allowed = self.allowed(n, m, shape[0] if batched else 0)
        if kind == "bool":
            text = allowed
        else:
            template = self.draw.choice(BIASES)
            text = self.words(template, n, m, shape[0], allowed)
            batched = batched and "{bool}" in template
        if batched and extra > 1:
            text = f"({text})[:, {', '.join(['None'] * (extra - 1))}]"
        return f"({text})"

    def allowed(self, n: int, m: int, batch: int) -> str:
        text = self.words(self.draw.choice(POSITIONS), n, m, batch, "")
        if not batch:
            return text
        data = self.words(self.draw.choice(DATA), n, m, batch, "")
        return self.draw.choice(
            (f"({data}) | (i == j)", data, f"({data}) & ({text})", f"({text}) | ({data})")
        )

    def words(self, template: str, n: int, m: int, batch: int, allowed: str) -> str:
        i, j = f"torch.arange({n})[:, None]", f"torch.arange({m})"
        if not self.lines or not any(
            line.startswith("i = ") and str(n) in line for line in self.lines
        ):
            self.lines += [f"i = {i}", f"j = {j}"]
        found = template.replace("{bool}", allowed).replace("{q}", str(n)).replace("{k}", str(m))
        found = found.replace("{w:q,k}", f"{{w:{n},{m}}}")
        for word, sizes, high in (
            ("{queries}", f"{batch},{n}", 3),
            ("{keys}", f"{batch},{m}", 3),
            ("{lengths}", f"{batch}", m + 1),
        ):
            if word in found:
                found = found.replace(word, self.filler.hole_ids(f"{sizes};{high}"))
        return self.filler.fill(found)
