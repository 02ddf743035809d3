"""Fuzz tests: mutated inputs either work or raise the error that the documentation names.

Continuous integration runs a few seeded examples of each test. ``make fuzz`` sets the environment variable
``IDAVLM_FUZZ`` to run that many times as many, with new random examples.
"""

import os

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("IDAVLM_FUZZ", "1"))


def examples(count: int) -> int:
    """Number of examples of a test that has ``count`` in continuous integration."""
    return count * FACTOR


def fuzz_settings(count: int) -> settings:
    """Settings of a fuzz test: ``count`` seeded examples in continuous integration, more and random ones otherwise."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=examples(count),
        deadline=None,
        derandomize=FACTOR == 1,
        suppress_health_check=checks,
        database=None,
    )
