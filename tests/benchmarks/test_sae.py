"""The SAE benchmark with small batches."""

from __future__ import annotations

from tests.benchmarks._small import run_small


def test_a_sparse_step_is_faster_than_saelens_own() -> None:
    done = run_small("sae", "--rounds", "3")
    assert done.returncode == 0, done.stdout + done.stderr
