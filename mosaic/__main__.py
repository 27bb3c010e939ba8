"""``python -m mosaic``: print the table of rules, one line per op; with ``methods`` the README's
table of methods; with ``calibrate`` measure this GPU's kernels, to choose by."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from mosaic.attention.kernels.calibrate import calibrate
from mosaic.attention.table import methods_table
from mosaic.partition.table import TABLE, Rule


def said(form: Callable[..., Any]) -> str:
    """A rule's own text, or the first line of what its function says."""
    if isinstance(form, Rule):
        return str(form)
    if isinstance(form, partial):
        form = form.func
    return (form.__doc__ or "").strip().split("\n")[0]


def table() -> str:
    width = max(map(len, TABLE))
    return "\n".join(f"{name:<{width}}  {said(form)}" for name, form in TABLE.items())


if __name__ == "__main__":
    if sys.argv[1:] == ["calibrate"]:
        calibrate()
    else:
        print(methods_table() if sys.argv[1:] == ["methods"] else table())
