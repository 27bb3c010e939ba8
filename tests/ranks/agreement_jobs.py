"""Ranks that differ from each other: each job returns the message that its rank saw."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import contract_cases as cc
import torch
import torch.nn.functional as F
from models.gpt import GPT

import mosaic
from mosaic.frontend import backend, data_check
from mosaic.runtime import rendezvous
from mosaic.torch_private import default_store


def message(p: int, build, spec: mosaic.ShardingSpec | None = None) -> str:
    mosaic.init(sp_size=p)
    options = {"inner": "eager", **({"spec": spec} if spec else {})}
    model, x = build()
    return caught(lambda: torch.compile(model, backend="mosaic", options=options)(x))


def rank() -> int:
    return torch.distributed.get_rank()


def model_and_input(n: int = 13, kind: type[torch.nn.Module] = cc.Mean) -> tuple:
    torch.manual_seed(0)
    model, (x,), _ = cc.built(kind, n=n)
    return model, x


def attention_and_input(n: int = 13) -> tuple:
    """Compiled sooner."""
    x = torch.linspace(-1, 1, 2 * n * cc.E, dtype=torch.float64).view(2, n, cc.E)
    return attend, x.requires_grad_()


def attend(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def other_length(p: int) -> str:
    return message(p, lambda: model_and_input(13 + rank()))


def other_spec(p: int) -> str:
    method = "ring" if rank() else "all_gather"
    spec = mosaic.ShardingSpec(inputs={"x": "batch tokens features"}, axes={"tokens": method})
    return message(p, model_and_input, spec)


def other_data(p: int) -> str:
    def build():
        model, x = model_and_input()
        return model, x + rank()

    return message(p, build)


def other_parameters(p: int) -> str:
    def build():
        model, x = model_and_input()
        with torch.no_grad():
            model.w.bias += rank()
        return model, x

    return message(p, build)


def at_step_three(p: int, spec: mosaic.ShardingSpec | None = None) -> tuple[int, str]:
    """How many steps went well, and the message; rank 1 is given another batch in the third."""
    mosaic.init(sp_size=p)
    options = {"inner": "eager", **({"spec": spec} if spec else {})}
    model, x = model_and_input()
    compiled = torch.compile(model, backend="mosaic", options=options)
    for step in range(4):
        batch = x + step + (rank() if step == 2 else 0)
        try:
            compiled(batch).sum().backward()
        except Exception as error:
            return step, str(error)
    return 4, "no error"


def another_compiled_length(p: int) -> str:
    """Every rank has compiled both lengths, and in the third step they take different ones."""
    mosaic.init(sp_size=p)
    model, x = model_and_input()
    compiled = torch.compile(model, backend="mosaic", options={"inner": "eager"}, dynamic=False)
    try:
        for n in (13, 11, 13 - 2 * rank()):
            compiled(x[:, :n])
    except Exception as error:
        return str(error)
    return "no error"


def at_step_three_of_a_gpu(p: int) -> tuple[int, str, list[str]]:
    """As if a comparison came to the host later; and what happened in which order."""
    there, given, happened = data_check.Comparison.of, backend.parts_of, []

    def noting(*args):
        happened.append("run")
        return given(*args)

    event = SimpleNamespace(synchronize=lambda: happened.append("wait"), query=lambda: True)
    later = staticmethod(lambda *about: replace(there(*about), event=event))
    data_check.Comparison.of, backend.parts_of = later, noting  # these ranks serve one test
    return *at_step_three(p), happened


def another_batch_of_a_model(p: int) -> tuple[int, str, list[float]]:
    """Of a parallelized one, as on a GPU; how many steps went well, and their losses."""
    context = mosaic.init(sp_size=p)
    there = data_check.Comparison.of
    event = SimpleNamespace(synchronize=lambda: None, query=lambda: True)
    data_check.Comparison.of = staticmethod(lambda *about: replace(there(*about), event=event))
    torch.manual_seed(0)
    model = GPT(vocab=31, context=16, embed=16, heads=2, layers=2).double()
    spec = mosaic.ShardingSpec(inputs={"ids": "batch tokens"}, axes={"tokens": "ring"})
    mosaic.parallelize(model, spec, inner="eager")
    losses: list[float] = []
    for step in range(4):
        ids = torch.arange(26).view(2, 13) + step + (step == 2) * context.rank()
        try:
            losses.append(float(model(ids, ids)[1].detach()))
        except Exception as error:
            return step, str(error), losses
    return 4, "no error", losses


def alternating_lengths(p: int) -> int:
    """Nothing is wrong. How many graphs follow another."""
    context = mosaic.init(sp_size=p)
    model, x = model_and_input()
    compiled = torch.compile(model, backend="mosaic", options={"inner": "eager"}, dynamic=False)
    for step in range(6):
        compiled(x[:, : 13 - step % 2])
    (ledger,) = context.ledgers.values()
    return len(ledger.follows)


def one_is_gone(p: int) -> str:
    """Rank 1 says that it is a process that has ended."""
    mosaic.init(sp_size=p)
    if rank() == 0:
        return message(p, attention_and_input)
    ended = subprocess.Popen(["true"])
    ended.wait()
    default_store().set("mosaic/process/1", json.dumps([rendezvous.machine(), ended.pid]))
    return "not compiled"


def one_is_late(p: int) -> tuple[str, set[str]]:
    """What is said, and what is logged meanwhile. Rank 1 comes when rank 0 waits."""
    group, logged = mosaic.init(sp_size=p).group(), []
    assert group is not None
    rendezvous.SAY_AFTER = 1.5
    rendezvous.log.warning = lambda text, *args: logged.append(text % args)  # type: ignore
    if rank() == 1:
        while not rendezvous._noted(default_store(), group, "waits", 0):
            time.sleep(0.1)
        time.sleep(1)
    try:
        said = message(p, attention_and_input)
        return said, {text.rpartition(" (")[0] for text in logged if rendezvous.COMPILE in text}
    finally:
        rendezvous.SAY_AFTER = 30.0
        del rendezvous.log.warning


def other_methods(p: int) -> str:
    mosaic.init(sp_size=p)
    q = torch.randn(1, 2, 3, 8)
    return caught(lambda: mosaic.attention(q, q, q, ("ring", "ulysses")[rank()]))


def each_waits_for_another_thing(p: int) -> str:
    if rank() == 0:
        return message(p, attention_and_input)
    mosaic.init(sp_size=p)
    return caught(lambda: mosaic.gather(torch.ones(2, 3), 1))


def one_without_gradients(p: int) -> str:
    with torch.set_grad_enabled(rank() == 0):
        return message(p, attention_and_input)


def caught(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return str(getattr(error, "inner_exception", error))
    return "no error"


def other_compiled_modes(p: int) -> str:
    """Every rank has compiled both modes, and then they take different ones."""
    mosaic.init(sp_size=p)
    model, x = attention_and_input()
    compiled = torch.compile(model, backend="mosaic", options={"inner": "eager"})
    compiled(x)
    with torch.no_grad():
        compiled(x)
    with torch.set_grad_enabled(rank() == 0):
        return caught(lambda: compiled(x))


def one_compiles_another(p: int) -> None:
    """Rank 0 goes on with a length that is compiled, rank 1 with a new one."""
    mosaic.init(sp_size=p)
    model, x = attention_and_input()
    compiled = torch.compile(model, backend="mosaic", options={"inner": "eager"}, dynamic=False)
    compiled(x)
    compiled(attention_and_input(13 + rank())[1])


def keys_are_deleted(p: int) -> list[int]:
    """How many keys there are in the store after so many questions."""
    group, store = mosaic.init(sp_size=p).group(), default_store()
    assert group is not None
    found = []
    for _ in range(3):
        for _ in range(5):
            assert rendezvous.exchange(group, str(rank()), "ask") == ["0", "1"]
        torch.distributed.barrier(group)
        found.append(store.num_keys())
        torch.distributed.barrier(group)
    return found


def one_fails(p: int) -> str:
    spec = mosaic.ShardingSpec(inputs={"y" if rank() else "x": "b t f"}, axes={"t": "ring"})
    return message(p, model_and_input, spec)


def late_after_a_failure(p: int) -> str:
    """Rank 1 cannot compile; that is caught, and then rank 1 is late with what it can."""
    assert "error" not in one_fails(p)[:8]
    mosaic.get_context().shutdown()
    if rank() == 1:
        time.sleep(rendezvous.LOOK_AFTER + 1.5)
    return message(p, attention_and_input)


def other_collectives(p: int) -> str:
    """As if a pass of torch's had dropped a collective on rank 1."""
    kept = backend.sequence

    def dropped(*args):
        steps = kept(*args)
        return steps[:-1] if rank() else steps

    backend.sequence = dropped
    return message(p, lambda: model_and_input(kind=cc.Reductions))


def one_fails_late(p: int) -> str:
    """As Inductor may, after the ranks have agreed on what they do."""

    def failing(*args):
        raise RuntimeError("the C++ compiler is missing")

    backend.INNER = {"eager": failing} if rank() else backend.INNER
    return message(p, model_and_input)
