"""Prints the contract's table: for each method how many cases ran and how many were refused, and why."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.methods.contract.report import main

main()
