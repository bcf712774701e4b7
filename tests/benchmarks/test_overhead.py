"""The part of the overhead benchmark that takes seconds: what Python costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_hooked_forward_costs_less_python_than_the_bridge() -> None:
    # A process of its own: here every function of ours is slowed down by the shape checks.
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.overhead", "--small", "--rounds", "9"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
