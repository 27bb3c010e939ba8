"""What a training step holds on one GPU, by kind, beside what the plan counted before it ran.

    python tests/gpu/check_memory.py [--small] [--seconds 140]

Hugging Face's Llama: eight layers (hidden 4,096, 32 heads that share 8 of keys), vocabulary
128,256, bfloat16, its loss by labels, AdamW (fused). 16,384 tokens, and 32,768 with checkpoints:
each as one graph, as one graph with torch's activation budget of 0.5, and block by block under
``save_on_cpu``. Each way is a process of its own, which compiles beside the others and is measured
while it has the GPU to itself: milliseconds are a median of 5 steps, by CUDA events.

``shown`` is torch.cuda's count: ``kept`` of what forward leaves, ``peak`` of a step. Under
``save_on_cpu`` it is what went to the CPU, and the plan, which is of one graph, counts no peak: one
graph would hold everything until it ends, blocks hold their own. Exits 1 if another figure is more
than 10% off. On a CPU (``--small``) the sizes are tiny, and only what went to the CPU is shown.
"""

from __future__ import annotations

import argparse
import fcntl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "examples")]
from measure import held_by  # noqa: E402

import mosaic  # noqa: E402
from mosaic.attention.cost import size  # noqa: E402
from mosaic.report.memory import Memory  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
INNER = "inductor" if CUDA else "eager"
NAMES = dict.fromkeys(("input_ids", "labels"), "batch tokens")
SPEC = mosaic.ShardingSpec(inputs=NAMES, axes={"tokens": "auto"})
FULL = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14_336, "num_hidden_layers": 8, "vocab_size": 128_256,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    name: str
    tokens: int
    checkpoint: bool = False
    budget: float = 1.0
    offload: bool = False


WAYS = (
    Way("one graph", 16_384),
    Way("budget 0.5", 16_384, budget=0.5),
    Way("save_on_cpu", 16_384, offload=True),
    Way("one graph", 32_768, checkpoint=True),
    Way("budget 0.5", 32_768, checkpoint=True, budget=0.5),
    Way("save_on_cpu", 32_768, checkpoint=True, offload=True),
)


class Offloading(torch.autograd.graph.save_on_cpu):
    """``save_on_cpu`` that counts what goes there, but for parameters. ``pinned``: copies are
    contiguous, which Inductor takes where checkpoints keep inputs alone."""

    def __init__(self, model: torch.nn.Module, pinned: bool):
        super().__init__(pin_memory=pinned and CUDA)
        self.sent, own = 0, {w.untyped_storage().data_ptr() for w in model.parameters()}
        pack = self.pack_hook

        def counted(x: Tensor) -> Any:
            for storage in held_by(x):
                self.sent += 0 if storage.data_ptr() in own else storage.nbytes()
            return pack(x)

        self.pack_hook = counted


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """While no other process measures."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def allocated() -> int:
    return torch.cuda.memory_allocated() if CUDA else 0


def built(way: Way, small: bool) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = SMALL if small else FULL
    config = LlamaConfig(**sizes, max_position_embeddings=way.tokens, use_cache=False)
    with DEVICE:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model: Any = LlamaForCausalLM(config).train()
        torch.set_default_dtype(before)
        ids = torch.randint(sizes["vocab_size"], (1, way.tokens))
    return model, ids


def counted(model: Any, ids: Tensor) -> Memory:
    return mosaic.explain(model, input_ids=ids, labels=ids, spec=SPEC, sp_size=1).memory()


def compiled(way: Way, model: Any) -> Callable[..., Any]:
    if way.offload:
        run = mosaic.parallelize(model, SPEC, checkpoint=way.checkpoint, inner=INNER)
        return lambda **given: run(**given)
    options = {"spec": SPEC, "inner": INNER}
    called: Callable[..., Any] = torch.compile(model, backend="mosaic", options=options)
    return called


def measured(way: Way, small: bool, lock: Path) -> dict[str, tuple[float, float]]:
    """(counted, shown) bytes by kind, and milliseconds."""
    mosaic.init(sp_size=1, device=DEVICE)
    before = allocated()
    model, ids = built(way, small)
    held = allocated() - before
    if way.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plan = counted(model, ids)
    if way.checkpoint and way.offload:
        model.gradient_checkpointing_disable()  # parallelize does it
    step = Step(way, model, compiled(way, model), ids)
    step.forward()  # compiles
    if CUDA:
        torch.cuda.empty_cache()
    with alone(lock):
        taken = [step() for _ in range(6)][1:]
    shown = step.shown
    return {
        "parameters": (plan.parameters, held),
        "gradients": (plan.gradients, shown["gradients"]),
        "optimizer": (plan.optimizer, shown["optimizer"]),
        "kept": (plan.kept, shown["kept"]),
        "peak": (0 if way.offload else plan.peak, shown["peak"]),
        "ms": (0, median(taken)),
    }


class Step:
    """A step of training; notes what it holds, the first time apart."""

    def __init__(self, way: Way, model: Any, called: Callable[..., Any], ids: Tensor):
        self.way, self.model, self.called, self.ids = way, model, called, ids
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=CUDA)
        self.shown: dict[str, float] = {}

    def forward(self) -> Tensor:
        out: Tensor = self.called(input_ids=self.ids, labels=self.ids).loss
        return out

    def __call__(self) -> float:
        """Milliseconds."""
        clock, begin = Clock(), allocated()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        hooks = Offloading(self.model, self.way.checkpoint) if self.way.offload else None
        with hooks or nullcontext():
            loss = self.forward()
        kept = hooks.sent if hooks else allocated() - begin
        loss.backward()
        del loss
        gradients, state = allocated() - begin, allocated()
        self.optimizer.step()
        self.shown.setdefault("optimizer", allocated() - state)
        self.optimizer.zero_grad()
        taken = clock.stop()
        peak = torch.cuda.max_memory_allocated() if CUDA else 0
        self.shown.update(kept=kept, gradients=gradients, peak=peak)
        return taken


class Clock:
    def __init__(self) -> None:
        self.start = time.perf_counter()
        if CUDA:
            self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.begin.record()

    def stop(self) -> float:
        if not CUDA:
            return 1e3 * (time.perf_counter() - self.start)
        self.end.record()
        torch.cuda.synchronize()
        return float(self.begin.elapsed_time(self.end))


def run(way: Way, small: bool, lock: Path) -> int:
    """Measure one way and print it; how many figures are off."""
    way = Way(**{**vars(way), "tokens": way.tokens // 64}) if small else way
    with torch._functorch.config.patch(activation_memory_budget=way.budget):
        found = measured(way, small, lock)
    off, rows = 0, []
    for kind, (count, shown) in found.items():
        if kind == "ms":
            rows.append(f"{kind} {shown:.0f}")
            continue
        text = f"{kind} {size(count)} {size(shown)}"
        if count and shown:
            off += abs(shown / count - 1) > 0.1 and not way.offload
            text += f" ({shown / count:.3f})"
        rows.append(text)
    name = f"{way.tokens:,} {'checkpointed, ' * way.checkpoint}{way.name}"
    print(f"{name:<34}" + "; ".join(rows), flush=True)
    return off


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=140, help="that all ways may take")
    parser.add_argument("--way", type=int, help="run this one, here")
    parser.add_argument("--lock", type=Path)
    given = parser.parse_args()
    if given.way is not None:
        return run(WAYS[given.way], given.small, given.lock)
    where = torch.cuda.get_device_name() if CUDA else "cpu"
    print(f"torch {torch.__version__}, {where}; counted, shown (shown / counted)", flush=True)
    end, off = time.monotonic() + given.seconds, 0
    with tempfile.NamedTemporaryFile(prefix="mosaic") as lock:
        command = [sys.executable, __file__, "--lock", lock.name, *["--small"] * given.small]
        running = [subprocess.Popen([*command, "--way", str(i)]) for i in range(len(WAYS))]
        for way, process in zip(WAYS, running, strict=True):
            try:
                off += abs(process.wait(max(1, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                off += 1
                print(f"{way.tokens:,} {way.name}: not done in {given.seconds:.0f} s", flush=True)
    return int(off > 0)


if __name__ == "__main__":
    sys.exit(main())
