"""The smallest programs of what the fuzzer has found, by cause: none may come back."""

from __future__ import annotations

from fuzz.program import Program, Step


def found(inputs: str, body: str, returned: str, setup: str = "", **options) -> Program:
    """Lines are split at newlines; inputs are ``x = ...`` lines."""
    step = Step(tuple(setup.splitlines()), (), tuple(body.splitlines()))
    return Program(tuple(inputs.splitlines()), (step,), returned, **options)


TABLE = "x = torch.randn(1, 11, 5, 6, requires_grad=True)"
LONG = "x = torch.randn(2, 7, 8, requires_grad=True)"
ATTEND = "y = F.scaled_dot_product_attention(x, x, x)"

FOUND: dict[str, Program] = {
    "a mask for queries of two dims": found(
        "x = torch.randn(7, 8, requires_grad=True)",
        "y = F.scaled_dot_product_attention(self.q.expand(3, 8), x, x, attn_mask=self.m.sin())",
        "y",
        "self.q = nn.Parameter(torch.randn(1, 8))\nself.m = nn.Parameter(torch.randn(3, 7))",
    ),
    "a gradient laid out otherwise than torch says": found(
        TABLE,
        "t = x.transpose(1, -2)\n"
        "y = F.scaled_dot_product_attention(t @ self.w, t, t) @ self.w\n"
        "loss = F.huber_loss(x, y.transpose(1, -2))",
        "loss",
        "self.w = nn.Parameter(torch.randn(6, 6))",
    ),
    "a row that a mask of -inf hides wholly": found(
        LONG + "\nids = torch.randint(0, 2, (2, 7))",
        "seen = (torch.arange(7)[:, None] >= torch.arange(7)) & (ids > 0)[:, None]\n"
        "y = (x @ x.mT).masked_fill(~seen, float('-inf')).softmax(-1) @ x.sin()",
        "y",
    ),
    "a row that an added mask hides wholly": found(
        LONG + "\nids = torch.randint(0, 2, (2, 7))",
        "seen = (torch.arange(7)[:, None] >= torch.arange(7)) & (ids > 0)[:, None]\n"
        "hidden = torch.zeros(2, 7, 7).masked_fill(~seen, float('-inf'))\n"
        "y = (x @ x.cos().mT + hidden).softmax(-1) @ x.sin()",
        "y",
    ),
    "rows that positions hide wholly": found(
        "x = torch.randn(2, 3, 7, 4, requires_grad=True)",
        "hidden = torch.arange(7)[:, None] <= torch.arange(7) + 2\n"
        "y = (x @ x.mT).masked_fill(hidden, float('-inf')).softmax(-1) @ x.sin()",
        "y",
    ),
    "rows that are hidden wholly, and zeroed": found(
        LONG + "\nids = torch.randint(0, 2, (2, 7))",
        "seen = (torch.arange(7)[:, None] >= torch.arange(7)) & (ids > 0)[:, None]\n"
        "w = (x @ x.mT).masked_fill(~seen, float('-inf')).softmax(-1).masked_fill(~seen, 0.0)\n"
        "y = (w @ x.sin()).nan_to_num()",
        "y.detach()",
    ),
}
