"""Run a function on p ranks: those of torchrun, or p local processes without it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing


def launch(fn: Callable[..., None], p: int, *args: object) -> None:
    """Call ``fn(*args)`` on p ranks; ``fn`` must stand at the top level of a module."""
    if "RANK" in os.environ:
        fn(*args)
        return
    torch.multiprocessing.start_processes(
        _rank, (p, _free_port(), fn, args), nprocs=p, start_method="spawn"
    )


def _rank(rank: int, p: int, port: int, fn: Callable[..., None], args: tuple[object, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(p),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",  # gloo on the CPU, however many GPUs there are
    }
    torch.set_num_threads(1)
    try:
        fn(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
