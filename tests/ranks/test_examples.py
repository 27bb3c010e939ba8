"""The examples run as a reader would run them; in CI that is the quickstart, which .ci/run runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    """What the example prints; it must end well."""
    outside = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=outside,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.full
def test_train_gpt() -> None:
    said = run("examples/train_gpt.py", "--ranks", "2", "--steps", "3", "--length", "64")
    before, after = map(float, re.findall(r"(?:before|steps) (\d+\.\d+)", said))
    assert after < before, said


@pytest.mark.full
@pytest.mark.parametrize("known", [13, 100])
def test_table_150k(known: int) -> None:
    """The parts of 2 ranks have 65 or 66 rows: fewer than are known, if these are 100."""
    sizes = ("--ranks", "2", "--rows", "131", "--known", str(known))
    said = run("examples/table_150k.py", *sizes)
    assert "rank 0 has [1, 66, 5] of the table" in said, said
    assert max(errors(said)) < 1e-5 and len(errors(said)) == 2, said


@pytest.mark.full
def test_video_2d() -> None:
    said = run("examples/video_2d.py", "--times", "5", "--places", "9")
    assert "times x places, 45 x 45" in said, said
    assert max(errors(said)) < 1e-12 and len(errors(said)) == 4, said


@pytest.mark.full
def test_hierarchical() -> None:
    said = run("examples/hierarchical.py", "--length", "67")
    assert max(errors(said)) < 1e-12 and len(errors(said)) == 28, said


def errors(said: str) -> list[float]:
    return [float(x) for x in re.findall(r"\b\d\.\de[+-]\d+", said)]


@pytest.mark.full
def test_quickstart() -> None:
    said = run("examples/quickstart.py")
    off = [float(x) for x in re.findall(r"(?:loss|gradients) (\d\.\de[+-]\d+)", said)]
    assert len(off) == 2 and max(off) < 1e-10, said
    assert "\x1b" not in said  # plain in a pipe


@pytest.mark.full
@pytest.mark.skipif(find_spec("tabpfn") is None, reason="needs tabpfn")
def test_tabpfn_table() -> None:
    said = run("examples/tabpfn_table.py", "--ranks", "2", "--rows", "900")
    needed, alone, budget, tried, _ = map(float, re.findall(r"(\d+\.\d) MiB", said))
    assert needed < budget < tried <= alone and needed < 0.7 * alone, said
    assert max(errors(said)) < 1e-5 and len(errors(said)) == 1, said
