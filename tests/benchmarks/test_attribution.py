"""The part of the attribution benchmark that takes a minute; times have a limit in the whole one alone."""

from __future__ import annotations

from tests.benchmarks._small import run_small


def test_scores_need_no_more_memory_for_more_examples() -> None:
    done = run_small("attribution", "--rounds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
