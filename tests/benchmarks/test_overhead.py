"""The part of the overhead benchmark that takes seconds: what Python costs."""

from __future__ import annotations

from tests.benchmarks._small import run_small


def test_a_hooked_forward_costs_less_python_than_the_bridge() -> None:
    done = run_small("overhead", "--rounds", "9")
    assert done.returncode == 0, done.stdout + done.stderr
