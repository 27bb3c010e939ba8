"""What ranks do in tests of attentions whose log-sum-exp is read."""

from __future__ import annotations

import itertools

import torch.distributed as dist
from attention_jobs import (
    CUTS,
    HEADS,
    MASKS,
    Case,
    difference,
    expected,
    found,
    group_name,
    methods_for,
    op_of,
    problem,
)


def lse_cases(full: bool = False) -> dict[str, float]:
    """Errors of the output, with the log-sum-exp, and of every gradient of both."""
    errors = {}
    masks = itertools.product(MASKS, ((0.0, False), (0.0, True), (0.3, False)))
    options = itertools.product(methods_for(dist.get_world_size()), masks, (HEADS, 2), CUTS)
    for number, (method, (mask, more), kv_heads, cut) in enumerate(options):
        if full or number % 31 == 0:
            case = Case(method, mask, kv_heads, cut, 11, 17, *more, lse=True)
            known = problem(case, group_name())
            got, want = found(known, op_of(known)), expected(known)
            for out in (got[0], want[0]):
                out[..., -1].clamp_(min=-1e3)  # of rows that see no key, or the lowest number
            errors[str(case)] = difference(got, want)
    return errors
