"""The SAE benchmark with small batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_sparse_step_is_faster_than_saelens_own() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.sae", "--small", "--rounds", "3"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
