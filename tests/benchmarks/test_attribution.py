"""The attribution benchmark on 8 examples, and on a store of 50,000."""

from __future__ import annotations

from tests.benchmarks._small import run_small


def test_features_are_twice_as_fast_as_trakers_and_scores_need_no_more_memory_for_more_examples() -> None:
    done = run_small("attribution", "--rounds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
