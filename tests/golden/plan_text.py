"""A plan's collectives as goldens hold them."""

from __future__ import annotations

from collections import Counter

from mosaic.report.plan import Plan


def collectives(plan: Plan) -> str:
    """Equal ones counted; without source lines, so that an edit above moves nothing."""
    alike = Counter((c.op, c.axis, c.bytes, c.why) for c in plan.collectives)
    return "\n".join(f"{n} x {op} {axis} {b} B: {why}" for (op, axis, b, why), n in alike.items())
