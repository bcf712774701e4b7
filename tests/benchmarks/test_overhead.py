"""The part of the overhead benchmark that takes seconds: what Python costs."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.overhead import LIMITS, python_bound


@pytest.mark.filterwarnings("ignore")
def test_a_hooked_forward_costs_less_python_than_the_bridge() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = python_bound(rounds=7)
    finally:
        torch.set_num_threads(threads)
    for name, value in rows.items():
        assert value <= LIMITS[name], f"{name}: {value:.2f}"
