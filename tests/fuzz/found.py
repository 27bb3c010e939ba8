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
}
