"""Offline, repeatable, and with the shapes checked that modules declare."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

# Before anything imports nnsight, which puts `.save` on every object: beartype cannot load after that.
import beartype  # noqa: F401
import jaxtyping
import pytest
import torch

ROOT = Path(__file__).parents[1]


def with_shapes() -> list[str]:
    """The modules of ours that declare shapes.

    Only they are checked: on the way of every call of every module the checks would take a third of the time.
    """
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("mm_adapters", "methods_multimodal")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py" and "from jaxtyping import" in path.read_text()
    ]


jaxtyping.install_import_hook(with_shapes(), "beartype.beartype")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line about the contract of methods: its cases, and how many of them refuse."""
    reports = [r for r in terminalreporter.stats.get("passed", []) if hasattr(r, "user_properties")]
    came = [value for r in reports for name, value in r.user_properties if name == "contract"]
    if came:
        refused = came.count("refused")
        terminalreporter.write_line(f"contract of methods: {len(came)} cases, {refused} of them refusals")
