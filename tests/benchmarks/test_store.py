"""The store's benchmark on 64 MB."""

from __future__ import annotations

from tests.benchmarks._small import run_small


def test_a_store_is_as_fast_as_a_memmap() -> None:
    done = run_small("store", "--rounds", "5", "--room", "1.25")
    assert done.returncode == 0, done.stdout + done.stderr
