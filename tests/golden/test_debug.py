"""What those see who look for what went wrong: MOSAIC_DEBUG, MOSAIC_OFF, ``mosaic.plans()``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mosaic
from mosaic import MosaicError
from mosaic.passes import JOINT, LOWERING, PIPELINE, partition
from mosaic.report import debug

X = torch.randn(1, 2, 12, 4, requires_grad=True)


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MOSAIC_DEBUG", str(tmp_path))
    monkeypatch.setattr(debug, "_compilations", iter([1, 2]))
    return tmp_path


def test_every_step_of_a_compilation_is_a_file(planned, folder):
    plan = planned(attend, X)
    written = folder / "rank1" / "compile1"
    names = sorted(path.name for path in written.glob("*.txt"))
    given = {"global": PIPELINE, "joint": JOINT, "forward": LOWERING, "backward": LOWERING}
    steps = [
        f"{kind} {name}".strip()
        for kind, passes in given.items()
        for name in ("", *(step.__name__ for step in passes))
    ]
    assert names == [*(f"{i:02} {step}.txt" for i, step in enumerate(steps)), "plan.txt"]
    assert (written / "plan.txt").read_text() == f"{plan}\n"
    (difference,) = written.glob("* global partition.diff")
    assert "slice" in difference.read_text()
    assert not [*written.glob("* global infer_axes.diff")]  # it rewrites nothing


def test_what_a_failing_pass_was_given_is_there(planned, folder, monkeypatch):
    monkeypatch.setitem(partition.__globals__, "write", lambda *_: 1 / 0)
    with pytest.raises(Exception, match="division by zero"):
        planned(attend, X)
    names = sorted(path.name for path in (folder / "rank1" / "compile1").glob("*.txt"))
    assert names[-1].endswith(" global choose_method.txt")


def test_a_pass_that_is_needed_stays(planned, monkeypatch):
    monkeypatch.setenv("MOSAIC_OFF", "overlap, partition")
    with pytest.raises(Exception, match="no optional pass: partition") as caught:
        planned(attend, X)
    assert isinstance(caught.value.inner_exception, MosaicError)


def test_a_pass_that_is_off_did_not_run(planned, monkeypatch):
    monkeypatch.setenv("MOSAIC_OFF", "overlap")
    assert "overlap" not in {report.name for report in planned(attend, X).passes}


def test_plans_are_those_made_meanwhile(planned):
    with mosaic.plans() as plans:
        first = planned(attend, X)
    planned(attend, X)
    assert plans == [first] and "local" in first.graphs
