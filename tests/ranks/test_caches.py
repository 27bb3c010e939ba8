"""Compiled code is never another rank's, and never that of an older lowering."""

from __future__ import annotations

from pathlib import Path

import cache_jobs as jobs
import pytest
from compare import assert_close, compare_gradients
from rank_pool import RankPool


def fresh_run(cache: Path, edited: bool = False) -> list[dict]:
    """New processes, as after a restart: what they find is on the disk."""
    pool = RankPool(2, timeout=300)
    try:
        return pool.run(jobs.run, 2, str(cache), edited)
    finally:
        pool.close()


@pytest.mark.full
def test_ranks_share_a_cache_directory(tmp_path: Path) -> None:
    """13 tokens over two ranks are 7 and 6: two programs. The second run finds both compiled."""
    want = jobs.plain()
    for got in fresh_run(tmp_path) + fresh_run(tmp_path):
        assert_close("loss", got["loss"], want["loss"], 1e-10)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)
    edited = fresh_run(tmp_path, edited=True)
    for got in edited:
        assert_close("loss of an edited lowering", got["loss"], 2 * want["loss"], 1e-10)
    assert edited[0]["order"] == edited[1]["order"] != [], "ranks issue collectives in one order"
