"""The part of the dissection benchmark that takes seconds: ours equals the formula, within its memory."""

from __future__ import annotations

from tests.benchmarks._small import run_small


def test_clip_dissect_equals_its_formula_in_bounded_memory() -> None:
    done = run_small("dissection", "--rounds", "1")
    assert done.returncode == 0, done.stdout + done.stderr
