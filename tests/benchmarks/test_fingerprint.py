"""What a fingerprint costs, on tiny-clip."""

from __future__ import annotations

from tests.benchmarks._small import run_small


def test_a_fingerprint_is_less_than_a_hundredth_of_the_work() -> None:
    done = run_small("fingerprint", "--rounds", "3")
    assert done.returncode == 0, done.stdout + done.stderr
