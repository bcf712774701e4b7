"""The part of the cross-attention benchmark that takes seconds, with room for a busy machine."""

from __future__ import annotations

from tests.benchmarks._small import run_small


def test_watching_words_costs_little_and_one_gradient_a_few_generations() -> None:
    done = run_small("cross_attention", "--rounds", "5", "--room", "1.15")  # Six steps, on a busy machine.
    assert done.returncode == 0, done.stdout + done.stderr
