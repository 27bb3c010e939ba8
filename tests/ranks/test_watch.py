"""Ranks that wait in a collective say for whom, and do not wait for one that is gone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import watch_jobs as jobs
from rank_pool import RankError, RankPool

from mosaic.runtime import rendezvous
from mosaic.runtime.watch import END_AFTER, Watch


@pytest.fixture
def two() -> Iterator[RankPool]:
    pool = RankPool(2, timeout=120)
    yield pool
    pool.close()


def test_a_rank_that_is_killed(two: RankPool) -> None:
    with pytest.raises(RankError, match=r"step 3: .*ranks \[1\] are gone, and rank 0 runs"):
        two.run(jobs.one_is_killed, 2)


def test_a_rank_that_is_late(two: RankPool) -> None:
    (said, first), (nothing, second) = two.run(jobs.one_is_late, 2)
    assert said and all(
        text.startswith("rank 0 waits for ranks [1] to run a compiled graph, its run 3")
        for text in said
    )
    assert not nothing
    assert max(*first, *second) < 1e-12


def watching(store: dist.Store, number: int) -> Watch:
    """Rank 0, with a GPU, beside rank 1, which is this process."""
    store.set("runs/0", "3")
    store.set("runs/1", "3")
    return Watch(0, {1: (rendezvous.machine(), number)}, "runs", torch.device("cuda", 0), store)


@pytest.fixture
def gpu() -> Iterator[mock.Mock]:
    """Whose work is at its end, or not; what ends a process raises instead."""
    with (
        mock.patch("torch.cuda.default_stream") as stream,
        mock.patch("os._exit", side_effect=SystemExit),
        mock.patch("faulthandler.dump_traceback"),
    ):
        yield stream.return_value.query


@pytest.fixture
def ended() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def passed(about: Watch) -> None:
    """As if it had been seen so many seconds ago."""
    about.gone = {rank: since - END_AFTER - 1 for rank, since in about.gone.items()}


def test_a_gpu_that_waits_for_a_rank_that_is_gone(gpu: mock.Mock, ended: int) -> None:
    about = watching(dist.HashStore(), ended)
    gpu.return_value = False
    about.look()
    assert [*about.gone] == [1]
    about.end_if_waiting()  # not at once
    passed(about)
    with pytest.raises(SystemExit):
        about.end_if_waiting()


def test_a_gpu_whose_work_is_done_is_left(gpu: mock.Mock, ended: int) -> None:
    about = watching(dist.HashStore(), ended)
    about.look()
    passed(about)
    gpu.return_value = True
    about.end_if_waiting()
    gpu.return_value = False
    about.end_if_waiting()


def test_a_rank_that_has_done_its_part_may_leave(gpu: mock.Mock, ended: int) -> None:
    store = dist.HashStore()
    about = watching(store, ended)
    store.set("mosaic/left/1", "")
    about.look()
    assert not about.gone


def test_a_rank_that_left_before_its_part(gpu: mock.Mock) -> None:
    store = dist.HashStore()
    about = watching(store, os.getpid())
    store.set("mosaic/left/1", "")
    store.set("runs/1", "2")
    about.look()
    assert [*about.gone] == [1]
