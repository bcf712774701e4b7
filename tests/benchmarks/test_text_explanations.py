"""The parts of the text-explanation benchmarks that take seconds: equal results, memory within bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from methods_multimodal.decomposition import decompose
from mm_adapters import HookedModel
from tests.benchmarks.decomposition import all_rows, vit


@pytest.mark.parametrize("name", ["splice", "decomposition"])
def test_the_small_benchmark_is_within_its_limits(name: str) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", f"tests.benchmarks.{name}", "--small"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_all_rows_formulation_gives_the_same_numbers() -> None:
    module, pixels = vit(2, small=True), torch.randn(1, 3, 112, 112)
    ours = decompose(HookedModel(module), images=pixels)
    torch.testing.assert_close(ours.heads, all_rows(module, pixels), rtol=1e-4, atol=1e-5)
