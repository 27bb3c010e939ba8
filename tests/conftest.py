"""What every test shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Ranks collect between jobs; Dynamo would after each compile.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

import hypothesis
import pytest
import torch
from rank_pool import RankPool, forget_what_was_said

gc.freeze()  # collections, of which compilers cause many, need not look at what is imported
gc.set_threshold(50_000, 20, 20)

# Ranks are forked from this process, which is safe only while OpenMP has no threads here.
torch.set_num_threads(1)

# The first call of a torch op may take longer than the deadline of an example.
hypothesis.settings.register_profile("mosaic", deadline=None)
hypothesis.settings.load_profile("mosaic")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in two processes, a file to each: a test of one process leaves a core
    idle, and so do ranks that wait for each other. Named files run in this process, where ``-s``
    and a debugger work; so does the suite with ``-n0``, ``--pdb`` or ``-p no:xdist``."""
    options, is_worker = config.option, hasattr(config, "workerinput")
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if is_worker or not is_whole or not config.pluginmanager.hasplugin("xdist"):
        return
    if options.numprocesses is None and not options.usepdb and not options.collectonly:
        options.numprocesses, options.dist = 2, "loadfile"
        options.loadscopereorder = False  # the short ones come last, so that both end together


@pytest.fixture(autouse=True)
def hears_what_is_said_once() -> None:
    forget_what_was_said()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """``ranks(p)`` is the pool of p gloo ranks; each is started once and serves all tests."""
    pools: dict[int, RankPool] = {}

    def pool(p: int) -> RankPool:
        return pools.setdefault(p, RankPool(p))

    yield pool
    for started in pools.values():
        started.close()
