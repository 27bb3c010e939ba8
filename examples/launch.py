"""Run a function on p ranks: those of torchrun, or p local processes without it.

On GPUs where there are enough of them, else on the CPU.
"""

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


def device() -> torch.device:
    """For ``mosaic.init``: this rank's own GPU (it then takes NCCL), or the CPU (and gloo) where
    this host has fewer GPUs than ranks."""
    gpus, ranks = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus >= ranks:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if gpus and os.environ["RANK"] == "0":
        print(f"ranks on this host: {ranks}, GPUs: {gpus}; so on the CPU, with gloo")
    return torch.device("cpu")


def _rank(rank: int, p: int, port: int, fn: Callable[..., None], args: tuple[object, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(p),
        "LOCAL_WORLD_SIZE": str(p),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
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
