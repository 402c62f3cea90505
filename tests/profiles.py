"""How long the tests that search at random do so: briefly in CI, long when told to.

``HYPOTHESIS_PROFILE=long`` tries 20,000 cases of each property; ``KVCODEC_MUTANTS=1000000`` makes
so many mutants of pages.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
MUTANTS = int(os.environ.get("KVCODEC_MUTANTS", "40000"))


def examples(count: int) -> settings:
    """Settings for `count` cases in CI and 20,000 in the long profile."""
    return settings(
        max_examples=20_000 if LONG else count,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
