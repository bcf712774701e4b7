"""The store's benchmark on 64 MB."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_store_is_as_fast_as_a_memmap() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.store", "--small", "--rounds", "5"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
