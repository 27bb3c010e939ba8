"""Grad mode and autocast, as they were when a node was captured.

A recipe may be written far from where the user wrote it (a slice that is hoisted, a whole value
made on demand), so every node carries its own modes and the emitter switches to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Modes:
    """Whether gradients are recorded, and (device, enabled, dtype) of each autocast."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def current(cls) -> Modes:
        return cls(
            torch.is_grad_enabled(),
            tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in DEVICES),
        )

    def with_autocast(self, device: str, enabled: bool, dtype: torch.dtype | None) -> Modes:
        return replace(
            self,
            autocast=tuple(
                (d, enabled, dtype or old) if d == device else (d, on, old)
                for d, on, old in self.autocast
            ),
        )

    def autocast_on(self) -> None:
        """Make the thread's autocast this one."""
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.clear_autocast_cache()

    def encode(self) -> str:
        casts = (f"{d}:{int(on)}:{str(t).removeprefix('torch.')}" for d, on, t in self.autocast)
        return " ".join([f"grad:{int(self.grad)}", *casts])

    @classmethod
    def decode(cls, text: str) -> Modes:
        grad, *casts = text.split(" ")
        parts = (c.split(":") for c in casts)
        return cls(grad == "grad:1", tuple((d, on == "1", getattr(torch, t)) for d, on, t in parts))


def set_modes(encoded: str) -> None:
    """Stands in local programs: switch grad mode and autocast while AOTAutograd traces them."""
    modes = Modes.decode(encoded)
    torch.set_grad_enabled(modes.grad)
    modes.autocast_on()


@contextmanager
def modes_of(modes: Modes | None) -> Iterator[None]:
    """Run under ``modes`` without recording gradients: for fake values of the right dtype."""
    before = Modes.current()
    try:
        if modes is not None:
            modes.autocast_on()
        with torch.no_grad():
            yield
    finally:
        before.autocast_on()
