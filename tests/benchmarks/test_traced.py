"""The part of the tracing benchmark that takes seconds: what Python costs."""

from __future__ import annotations

from tests.benchmarks._small import run_small


def test_a_trace_costs_little_more_python_than_nnsights_own() -> None:
    done = run_small("traced", "--rounds", "15")
    assert done.returncode == 0, done.stdout + done.stderr
