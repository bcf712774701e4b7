"""The parts of the text-explanation benchmarks that take seconds: equal results, memory within bounds."""

from __future__ import annotations

import pytest
import torch

from methods_multimodal.text_explanations.decomposition import decompose
from mm_adapters import HookedModel
from tests.benchmarks._small import run_small
from tests.benchmarks.decomposition import all_rows, vit


@pytest.mark.parametrize("name", ["splice", "decomposition"])
def test_the_small_benchmark_is_within_its_limits(name: str) -> None:
    done = run_small(name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_all_rows_formulation_gives_the_same_numbers() -> None:
    module, pixels = vit(2, small=True), torch.randn(1, 3, 112, 112)
    ours = decompose(HookedModel(module), images=pixels)
    torch.testing.assert_close(ours.heads, all_rows(module, pixels), rtol=1e-4, atol=1e-5)
