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
    "a write into a slice that ends before it begins": found(
        LONG, ATTEND + "\nv = y.clone()\nv[:, 5:2] = 0.5", "v"
    ),
    "an output that is all padding": found(
        "x = torch.randn(2, 12, 8, requires_grad=True)",
        "q = x[..., 11:, :]\n"
        "y = torch.softmax(q @ x.mT, dim=-1) @ x\n"
        "v = F.pad(y, (0, 0, -1, 1), value=-1.5)",
        "v",
        spec="mosaic.ShardingSpec(inputs={'x': 'b n e'}, axes={'n': 'all_gather'})",
    ),
    "an output that is zeroed": found(LONG, ATTEND + "\nv = x.clone()\nv.zero_()", "y, v"),
    "a draw that nothing reads": found(
        LONG,
        ATTEND + "\nu = F.gumbel_softmax(y, dim=-2)\nv = F.dropout(y, 0.5, True)",
        "v",
        reference="one rank",
        calls=2,
    ),
    "a draw on the CPU": found(LONG, ATTEND + "\nv = torch.randperm(7)", "y, v * 0"),
    "running statistics": found(
        LONG, ATTEND + "\nv = self.norm(x.mT).mT + y", "v", "self.norm = nn.BatchNorm1d(8)"
    ),
    "an output that is written over": found(
        LONG, ATTEND + "\nv = y.clone()\nv.copy_(torch.arange(7.0).view(7, 1))", "v"
    ),
    "an output that counts": found(LONG, ATTEND, "y.norm(0)"),
    "an output into which nothing is written": found(
        LONG, ATTEND + "\nv = torch.zeros_like(y)\nv[:, -7:-7] = y[:, -7:-7]", "v"
    ),
    "a draw in the order of memory": found(
        TABLE,
        "y = F.scaled_dot_product_attention(x, x, x)\nz = y.transpose(1, 2)",
        "z + torch.rand_like(z)",
        reference="one rank",
    ),
    "a loss under no_grad": found(
        LONG, ATTEND + "\nwith torch.no_grad():\n    loss = F.huber_loss(y, y.detach())", "y, loss"
    ),
    "its own type under no_grad": found(
        LONG, ATTEND + "\nwith torch.no_grad():\n    z = y.type_as(x) + 1", "y, z"
    ),
    "a list of one under no_grad": found(
        LONG, ATTEND + "\nwith torch.no_grad():\n    z = torch.atleast_1d(y, x)[0] + 1", "y, z"
    ),
    "a view under no_grad": found(
        LONG,
        ATTEND + "\nwith torch.no_grad():\n    v, w = x.unflatten(0, (-1, 1)), y.mT",
        "y, v, v.unsqueeze(0), w * 2",
    ),
    "a view of an output, across a graph break": found(
        TABLE,
        "y = F.scaled_dot_product_attention(x, x, x).transpose(1, 2)\n"
        "torch._dynamo.graph_break()\nz = y.transpose(1, 2).view(11, -1) * 2",
        "z",
    ),
    "a draw behind a graph break": found(
        TABLE,
        "y = F.scaled_dot_product_attention(x, x, x).transpose(1, 2)\n"
        "torch._dynamo.graph_break()\nz = y + torch.randn_like(y)",
        "z",
        reference="one rank",
    ),
    "a slice of everything under no_grad": found(
        LONG,
        ATTEND + "\nwith torch.no_grad():\n    u, v = y.split(7, 1)[0], y.narrow(1, 0, 7)",
        "y.cos() + u * 2 + v * 3",
    ),
    "a dropout of nothing under no_grad": found(
        LONG, ATTEND + "\nwith torch.no_grad():\n    v = F.dropout(y, 0.5, False)", "v * 2"
    ),
    "the spread of equal numbers": found(
        TABLE,
        "y = F.scaled_dot_product_attention(x, x, x)\nz = y * 0 + 0.1",
        "y / (z.std(1, keepdim=True, correction=0) + y.mean(1, keepdim=True).exp())",
        spec="mosaic.ShardingSpec(inputs={'x': 'b n c e'})",
    ),
    "a list of views under no_grad": found(
        LONG,
        ATTEND + "\nwith torch.no_grad():\n    v = torch.meshgrid(y.sum((1, 2)), x[0, :, 0])",
        "y, v[0], v[1].unsqueeze(0)",
    ),
    "a draw in a checkpoint": found(
        LONG,
        ATTEND + "\nz = checkpoint(lambda t: t + torch.rand_like(t), y, use_reentrant=False)",
        "z",
        reference="one rank",
    ),
    "an embedding of no width": found(
        "x = torch.randn(13, 4, requires_grad=True)\nids = torch.randint(0, 9, (4, 1))",
        "y = F.scaled_dot_product_attention(x[:4], x, x)\n"
        "z = F.embedding(ids, self.w) + y.square().sum(1)",
        "z",
        "self.w = nn.Parameter(torch.randn(9, 4))",
        spec="mosaic.ShardingSpec(inputs={'x': 'n e'}, axes={'n': 'all_gather'})",
    ),
    "a write in a checkpoint": found(
        LONG,
        ATTEND + "\nz = checkpoint(lambda t: self.b.clamp_(-1, 1) * t, y, use_reentrant=False)",
        "z",
        "self.register_buffer('b', torch.randn(8) * 2)",
    ),
}
