"""A store that fails in the middle of a batch: no wrong page, no exception, no call that hangs."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_scenarios import SCENARIOS, run

#: What a loaded machine may add to a deadline; tools/fault_runs.py measures what a quiet one does.
SLACK_SECONDS = 0.5


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fault_in_every_call_costs_hits_and_nothing_else(name: str, tmp_path: Path) -> None:
    with SCENARIOS[name](tmp_path) as scenario:
        outcome = run(scenario, calls=5)
    assert (outcome.calls, outcome.wrong_pages, outcome.exceptions) == (5, 0, 0)
    assert outcome.latest < SLACK_SECONDS
    assert outcome.recovered
