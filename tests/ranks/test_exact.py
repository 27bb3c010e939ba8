"""Programs that were once silently wrong are right, or refused, on two ranks."""

from __future__ import annotations

import pytest
from exact_dying import PROGRAMS
from exact_jobs import check


@pytest.mark.parametrize("name", PROGRAMS)
def test_exact(ranks, name: str) -> None:
    for refusal, wrong in ranks(2).run(check, name, 2):
        assert not wrong, "\n".join(wrong)
        assert refusal.startswith(PROGRAMS[name].refusal) and bool(refusal) == bool(
            PROGRAMS[name].refusal
        )
