"""The part of the cross-attention benchmark that takes seconds, with room for a busy machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_watching_words_costs_little_and_one_gradient_a_few_generations() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.benchmarks.cross_attention",
            "--small",
            "--rounds",
            "5",
        ],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
