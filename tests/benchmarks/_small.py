"""The part of a benchmark that takes seconds, as a test runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_small(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m tests.benchmarks.NAME --small ARGUMENTS`.

    In a process of its own: under pytest every function of ours is slowed down by the shape checks.
    """
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", f"tests.benchmarks.{name}", "--small", *arguments],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
