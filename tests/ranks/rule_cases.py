"""All sample programs of the rules, by name."""

from __future__ import annotations

import rule_cases_along
import rule_cases_attention
import rule_cases_losses
import rule_cases_pointwise
import rule_cases_programs
import rule_cases_recurrences
import rule_cases_values
import rule_cases_views
import rule_cases_windows
import rule_cases_writes
from rule_case import Case

CASES: dict[str, Case] = {}
for module in (
    rule_cases_pointwise,
    rule_cases_views,
    rule_cases_values,
    rule_cases_losses,
    rule_cases_attention,
    rule_cases_programs,
    rule_cases_recurrences,
    rule_cases_along,
    rule_cases_windows,
    rule_cases_writes,
):
    repeated = CASES.keys() & module.CASES.keys()
    assert not repeated, repeated
    CASES.update(module.CASES)
