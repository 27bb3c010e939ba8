"""Attention over sharded axes: one op, and one module for each method.

A method has ``forward(q, k, v, mask, seed, plan) -> (out, lse)`` and
``backward(dout, q, k, v, mask, seed, out, lse, plan, need_dmask) -> (dq, dk, dv, dmask | None)``,
in plain torch ops and functional collectives.
"""

from __future__ import annotations

from mosaic.attention import all_gather, local, ring

#: The methods that a plan can name.
METHODS = {"ring": ring, "all_gather": all_gather, "local": local}
