"""Random calls that are wrong, or nearly: specs, options, inputs, arguments, ranks that disagree.

A call is a short script that every rank runs; ``rank`` is its number. Each is either fine or
refused by a MosaicError that says a sentence and a way out.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from fuzz.draw import Draw
from fuzz.judge import Verdict, failed, quiet
from fuzz.program import loaded
from torch import nn

import mosaic

#: What a user may write by mistake where something else is meant.
ODD = (
    "None",
    "0",
    "-1",
    "7",
    "2.5",
    "float('nan')",
    "True",
    "''",
    "'rows'",
    "b'n'",
    "()",
    "[1]",
    "{}",
    "{'x': 1}",
    "object()",
    "torch.ones(2)",
    "mosaic.Ring",
    "mosaic.Ring()",
    "lambda x: x",
    "nn.Linear(8, 8)",
    "10 ** 30",
)
FIELDS: dict[str, tuple[str, ...]] = {
    "inputs": (
        "{'x': 'b n e'}",
        "{'x': 'b n e'}",
        "{'x': 'b n'}",
        "{'x': 'b n e f'}",
        "{'x': 'b n n'}",
        "{'y': 'b n e'}",
        "{'x[0]': 'b n e'}",
        "{'x[': 'b n e'}",
        "{'': 'b n e'}",
        "{'x': ''}",
        "{'x': 'b,n,e'}",
        "{'x': ['b', 'n', 'e']}",
        "{0: 'b n e'}",
        "{'x': 'n b e'}",
        "{'x': '_ n _'}",
        "{'x': 'b n e', 'x.y': 'b n'}",
        "['x']",
        "'b n e'",
    ),
    "axes": (
        "{'n': 'ring'}",
        "{'n': 'ring'}",
        "{'n': 'ulysses'}",
        "{1: 'ring'}",
        "{-2: 'ring'}",
        "{5: 'ring'}",
        "{True: 'ring'}",
        "{'m': 'ring'}",
        "{'e': 'ring'}",
        "{'b': 'ring'}",
        "{'n': 'rong'}",
        "{'n': None}",
        "{'n': 3}",
        "{'n': mosaic.Ring}",
        "{'n': mosaic.Ring(mesh='zz')}",
        "{'n': mosaic.Ring(stages=9)}",
        "{'n': mosaic.Mesh2D(3, 3)}",
        "{'n': mosaic.Mesh2D(2, 1)}",
        "{'n': mosaic.Hierarchical(3)}",
        "{'n': mosaic.Composed()}",
        "{'n': 'local'}",
        "{'n': 'ring', 'b': 'ring'}",
        "{'n': 'ring', 1: 'ring'}",
        "{'n': mosaic.Ring(mesh='sp,sp')}",
        "{'n': mosaic.Ring(mesh='')}",
        "{'n': mosaic.Ring(mesh=3)}",
        "'n'",
        "['n']",
    ),
    "outputs": ("'shards'", "'whole'", "'cut'"),
    "on_gather": ("'error'", "'warn'", "'ignore'"),
    "gradients": ("'shares'", "'whole'", "'none'"),
    "check_inputs": ("'always'", "False", "True", "'never'"),
    "mesh_axis": ("'sp'", "'tp'", "'sp,dp'", "''"),
}
OPTIONS = (
    "'inner': 'eager'",
    "'inner': 'eager'",
    "'inner': 'aot_eager'",
    "'inner': None",
    "'inner': 3",
    "'inner': []",
    "'mode': 'max-autotune'",
    "'spec': 'ring'",
    "'spec': {'n': 'ring'}",
    "'spec': None",
    "'spec': mosaic.ShardingSpec",
    "3: 4",
)
INPUTS = (
    "torch.randn(2, 7, 8)",
    "torch.randn(2, 7, 8, requires_grad=True)",
    "torch.randn(2, 0, 8)",
    "torch.randn(0, 7, 8)",
    "torch.randn(2, 7, 0)",
    "torch.randn(2, 1, 8)",
    "torch.randn(7, 8)",
    "torch.randn(8)",
    "torch.randn(())",
    "torch.randn(2, 2, 7, 8)",
    "torch.ones(2, 7, 8, dtype=torch.int64)",
    "torch.ones(2, 7, 8, dtype=torch.bool)",
    "torch.randn(2, 7, 8, dtype=torch.complex64)",
    "torch.randn(2, 7, 8).half()",
    "torch.randn(2, 7, 8).to_sparse()",
    "torch.randn(2, 7, 8, device='meta')",
    "torch.full((2, 7, 8), float('nan'))",
    "torch.randn(2, 7, 1).expand(2, 7, 8)",
    "torch.randn(2, 8, 7).mT",
    "nn.Parameter(torch.randn(2, 7, 8))",
    "torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(4, 8)], layout=torch.jagged)",
    "torch.quantize_per_tensor(torch.randn(2, 7, 8), 0.1, 0, torch.quint8)",
    "[torch.randn(2, 7, 8)]",
    "{'a': torch.randn(2, 7, 8)}",
    "None",
    "3",
    "'text'",
    "torch.randn(2, 7, 8).numpy()",
)
#: Ranks that do not do the same.
APART = (
    "x = torch.randn(2, 7 + rank, 8); y = run(x)",
    "x = torch.randn(2, 7, 8) + rank; y = run(x)",
    "x = torch.randn(2, 7, 8).to(torch.float64 if rank else torch.float32); y = run(x)",
    "x = torch.randn(2, 7, 8, requires_grad=rank == 0); y = run(x)",
    "x = torch.randn(2 + rank, 7, 8); y = run(x)",
    "x = torch.randn(2, 7, 8); torch.set_grad_enabled(rank == 0); y = run(x)",
    "model.weight.data.add_(rank); x = torch.randn(2, 7, 8); y = run(x)",
    "model.weight.requires_grad_(rank == 0); x = torch.randn(2, 7, 8); y = run(x)",
    "model.train(rank == 0); x = torch.randn(2, 7, 8); y = run(x)",
    "model.causal = rank == 0; x = torch.randn(2, 7, 8); y = run(x)",
    "model.extra = rank; x = torch.randn(2, 7, 8); y = run(x)",
    "x = torch.randn(2, 7, 8); y = run(x); y = run(x + rank)",
    "x = torch.randn(2, 7, 8); y = run(x); y = run(torch.randn(2, 9 + rank, 8))",
    "x = torch.randn(2, 7, 8); y = run(x); y = run(torch.randn(2, 9 - 2 * rank, 8))",
    "x = torch.randn(2, 7, 8)\nwith torch.autocast('cpu', enabled=rank == 0): y = run(x)",
    "x = torch.randn(2, 7, 8)\nwith torch.inference_mode(rank == 0): y = run(x)",
    "x = torch.randn(2, 8, 7).mT if rank else torch.randn(2, 7, 8).mul(1); y = run(x)",
    "x = torch.randn(2, 7, 8)\nif rank: x[0, 0, 0] = float('nan')\ny = run(x)",
    "other = mosaic.ShardingSpec(check_inputs='always' if rank else 'first')\n"
    "run = torch.compile(model, backend='mosaic', options={'inner': 'eager', 'spec': other})\n"
    "x = torch.randn(2, 7, 8); y = run(x)",
    "x = mosaic.distribute(torch.randn(2, 7, 8), 1); y = run(x)",
    "x = mosaic.distribute(torch.randn(2, 7 + rank, 8), 1); y = run(x)",
    "x = mosaic.shard_tensor(torch.randn(2, 7 + rank, 8), 1); y = mosaic.gather(x)",
    "x = torch.randn(2, 3 + rank, 8); y = mosaic.gather(x, 1)",
    "q = torch.randn(2, 2, 3 + rank, 8); y = mosaic.attention(q, q, q, 'ring')",
    "q = torch.randn(2, 2, 3, 8); y = mosaic.attention(q, q, q, 'ring', causal=rank == 0)",
    "q = torch.randn(2, 2, 3, 8 + 8 * rank); y = mosaic.attention(q, q, q, 'ring')",
    "q = torch.randn(2, 2, 3, 8); y = mosaic.attention(q, q, q, ('ring', 'ulysses')[rank])",
)
#: Functions, with right arguments; one or two are replaced by odd ones.
CALLS: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "mosaic.attention",
        {
            "q": "torch.randn(1, 2, 3, 8)",
            "k": "torch.randn(1, 2, 3, 8)",
            "v": "torch.randn(1, 2, 3, 8)",
            "method": "'ring'",
            "causal": "False",
            "window": "None",
            "mask": "None",
            "query_documents": "None",
            "key_documents": "None",
            "scale": "None",
            "dropout": "0.0",
            "layout": "None",
            "key_layout": "None",
        },
    ),
    ("mosaic.shard_tensor", {"x": "torch.randn(2, 6, 8)", "dim": "1", "layout": "None"}),
    ("mosaic.gather", {"x": "torch.randn(2, 3, 8)", "dim": "1", "layout": "None"}),
    ("mosaic.distribute", {"x": "torch.randn(2, 6, 8)", "dim": "1", "layout": "None"}),
    ("mosaic.Layout.even", {"n": "7", "p": "2", "multiple_of": "1"}),
    ("mosaic.Layout.zigzag", {"n": "7", "p": "2", "multiple_of": "1"}),
    ("mosaic.Layout.of", {"n": "7", "ranks": "[[(0, 4)], [(4, 7)]]"}),
    ("mosaic.sum_gradients", {"module": "nn.Linear(3, 3)"}),
    ("mosaic.init", {"sp_size": "2", "mesh_shape": "None", "mesh_axes": "None", "device": "None"}),
    ("mosaic.init", {"mesh_shape": "(1, 2)", "mesh_axes": "('r', 'c')", "device": "'cpu'"}),
    ("mosaic.Ring", {"stages": "'auto'", "grad_dtype": "None", "mesh": "'sp'"}),
    ("mosaic.Mesh2D", {"rows": "2", "cols": "1", "mesh": "'sp'"}),
    ("mosaic.Hierarchical", {"intra_node_size": "2", "intra": "'local'", "inter": "'ring'"}),
    ("mosaic.Composed", {"heads": "mosaic.Ulysses(mesh='a')", "sequence": "mosaic.Ring()"}),
    ("mosaic.Ulysses", {"mesh": "'sp'"}),
    (
        "mosaic.MultiAxisAttention",
        {
            "embed_dim": "8",
            "num_heads": "2",
            "attention_axis": "1",
            "backend": "'ring'",
            "mesh_shape": "None",
            "causal": "False",
            "num_kv_heads": "None",
            "bias": "True",
            "dropout": "0.0",
            "layout": "None",
        },
    ),
    (
        "mosaic.CrossAxisAttention",
        {"embed_dim": "8", "num_heads": "2", "q_axis": "1", "kv_axis": "1", "backend": "'ring'"},
    ),
    (
        "mosaic.MultiAxisAttention2D",
        {"embed_dim": "8", "num_heads": "2", "axis1": "1", "axis2": "2", "mesh_shape": "(2, 1)"},
    ),
    ("mosaic.HierarchicalAttention", {"intra_node_size": "2", "causal": "False", "scale": "None"}),
    ("mosaic.ComposedAttention", {"mesh_shape": "(2, 1)", "seq_parallel": "'ring'"}),
    (
        "mosaic.explain",
        {"fn": "model", "x": "torch.randn(2, 7, 8)", "spec": "None", "sp_size": "2"},
    ),
    ("mosaic.shard", {"inputs": "{'x': 'b n e'}", "axes": "{'n': 'ring'}", "inner": "'eager'"}),
)
MORE_ODD = {
    "window": ("(1, 2)", "(-1, None)", "3", "(1,)", "(None, None)", "(0, 0)"),
    "layout": (
        "mosaic.Layout.even(7, 2)",
        "mosaic.Layout.even(6, 3)",
        "mosaic.Layout.zigzag(6, 2)",
    ),
    "mask": ("torch.ones(3, 6)", "torch.ones(3, 6) > 0", "torch.ones(6, 6) > 0", "torch.ones(2)"),
    "k": ("torch.randn(1, 1, 3, 8)", "torch.randn(1, 2, 4, 8)", "torch.randn(1, 2, 3, 4)"),
    "q": ("torch.randn(2, 3, 8)", "torch.randn(1, 2, 0, 8)", "torch.randn(1, 2, 3, 8).double()"),
    "dim": ("3", "-4", "-2", "'rows'"),
    "method": ("'auto'", "'local'", "mosaic.Mesh2D(2, 2)", "'mesh2d'", "mosaic.Ring(mesh='r')"),
    "device": ("'gpu'", "'cuda:99'", "'meta'", "torch.device('cpu')"),
    "dropout": ("1.0", "1.5", "-0.1", "0.5"),
    "query_documents": ("torch.zeros(1, 3)", "torch.zeros(1, 3, dtype=torch.int64)"),
    "sp_size": ("4", "3", "1"),
    "mesh_shape": ("(2, 2)", "(2, 1)", "(3,)", "[2]", "(0, 2)"),
    "mesh_axes": ("('a', 'b')", "('a', 'a')", "('dp', 'sp')", "['a']"),
    "grad_dtype": ("torch.float32", "'float32'", "'int8'", "torch.int8"),
    "ranks": ("[[(0, 4)], [(3, 7)]]", "[[(0, 9)]]", "[(0, 4)]", "[[(4, 0)]]"),
    "embed_dim": ("9", "8.0"),
    "num_heads": ("3", "16"),
}
MODEL = """\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.causal, self.extra = nn.Parameter(torch.ones(8)), False, 0

    def forward(self, x):
        y = F.scaled_dot_product_attention(x, x, x * self.weight, is_causal=self.causal)
        return F.dropout(y, 0.0, self.training) + self.extra


torch.manual_seed(0)
model = Model()
"""


def generate_call(draw: Draw) -> str:
    """The text of a script."""
    kind = draw.choice(("spec", "spec", "spec", "input", "apart", "apart", "call", "call", "call"))
    if kind == "call":
        return MODEL + call_of(draw)
    spec = "mosaic.ShardingSpec(inputs={'x': 'b n e'}, axes={'n': 'ring'})"
    options = "'inner': 'eager'"
    if kind == "spec":
        spec = spec_text(draw)
        if draw.chance(15):
            options = draw.choice(OPTIONS)
    elif draw.chance(50):
        spec = "mosaic.ShardingSpec()"
    if "'spec'" not in options:
        options += f", 'spec': {spec}"
    text = MODEL + "mosaic.init(sp_size=2)\n"
    text += f"run = torch.compile(model, backend='mosaic', options={{{options}}})\n"
    if kind == "apart":
        text += draw.choice(APART) + "\n"
    else:
        x = draw.choice(INPUTS) if kind == "input" else INPUTS[0]
        text += f"x = {x}\ny = run(x)\n"
    return text + "if isinstance(y, torch.Tensor) and y.requires_grad: y.sum().backward()\n"


def spec_text(draw: Draw) -> str:
    fields = {"inputs": "{'x': 'b n e'}", "axes": "{'n': 'ring'}"}
    for name in draw.sample(list(FIELDS), draw.integer(1, 3)):
        fields[name] = draw.choice(FIELDS[name] if draw.chance(70) else ODD)
    for name in ("inputs", "axes"):
        if draw.chance(8):
            del fields[name]
    return f"mosaic.ShardingSpec({', '.join(f'{k}={v}' for k, v in fields.items())})"


def call_of(draw: Draw) -> str:
    name, arguments = draw.choice(CALLS)
    arguments = dict(arguments)
    for argument in draw.sample(list(arguments), draw.integer(1, 2)):
        odd = (*MORE_ODD.get(argument, ()) * 4, *ODD)
        arguments[argument] = draw.choice(odd)
    given = [f"{k}={v}" for k, v in arguments.items()]
    if name == "mosaic.explain":
        given = [arguments["fn"], "x", *given[2:]]
    if name == "mosaic.sum_gradients":
        given = list(arguments.values())
    before = "" if name == "mosaic.init" else "mosaic.init(sp_size=2)\n"
    if name == "mosaic.explain":
        before += f"x = {arguments['x']}\n"
    text = f"{before}made = {name}({', '.join(given)})\n"
    if name == "mosaic.MultiAxisAttention":
        text += "y = made(torch.randn(2, 3, 8))\n"
    if name == "mosaic.CrossAxisAttention":
        text += "y = made(torch.randn(2, 3, 8), torch.randn(2, 3, 8))\n"
    return text


def judge_call(source: str) -> Verdict:
    """Run a script on this rank: ok, refused, or crash; invalid where eager mode fails as well."""
    quiet()
    torch._dynamo.reset()
    space: dict[str, Any] = {"rank": dist.get_rank(), "mosaic": mosaic, "torch": torch}
    space |= {"F": F, "nn": nn}
    try:
        loaded(source, space)
    except Exception as error:
        verdict = failed(error)
        model = vars(sys.modules["program"])
        is_own = verdict.outcome == "crash" and fails_eagerly(model)
        return Verdict("invalid", verdict.detail) if is_own else verdict
    finally:
        torch.set_grad_enabled(True)
    return Verdict("ok")


def fails_eagerly(space: dict[str, Any]) -> bool:
    """Whether the model itself cannot take the input."""
    try:
        space["model"](space["x"]) if "x" in space else None
    except Exception:
        return True
    return False
