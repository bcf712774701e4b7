"""Offline, single-threaded where it is faster, and repeatable."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

# Before anything imports nnsight, which puts `.save` on every object: beartype cannot load after that.
import beartype  # noqa: F401
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
