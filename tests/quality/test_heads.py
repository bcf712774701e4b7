"""A small part of `python -m tests.quality.heads`: names say what the direct path does, beside nulls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mm_adapters as mm
from tests.quality import heads as quality


@pytest.fixture(scope="module")
def trained() -> quality.Heads:
    return quality.measured(mm.load("tiny-clip"), 150, 0)


def test_ablating_a_named_head_lowers_what_it_is_named_for(trained: quality.Heads) -> None:
    found = {row: float(value.mean()) for row, value in quality.rows(trained).items()}
    rng = np.random.default_rng(0)
    dealt = [quality.rows(trained, rng) for _ in range(20)]
    chance = {row: float(torch.cat([one[row] for one in dealt]).mean()) for row in found}
    assert int(trained.named.sum()) >= 5
    assert found["ablated, direct, named"] >= 0.8
    # In the running model only where the direct path is most of what the head does.
    assert int((trained.named & trained.direct).sum()) >= 2
    assert found["ablated, total, named and direct"] >= 0.8
    assert found["ablated, total, by total effect"] >= 0.8
    for row in ("ablated, direct, named", "ablated, total, by total effect", "truly driven, first text"):
        assert found[row] >= chance[row] + 0.25, (row, found[row], chance[row])


def test_margins_fall_by_what_a_head_puts_into_them() -> None:
    # Two images, two values: the right text's cosine less the other's.
    texts = {a: torch.eye(2, 4) for a in quality.ATTRIBUTES}
    truth = {a: torch.tensor([0, 1]) for a in quality.ATTRIBUTES}
    images = torch.tensor([[0.9, 0.2, 0.0, 0.0], [0.1, 0.6, 0.0, 0.0]])
    expected = torch.full((6,), (0.7 + 0.5) / 2)
    torch.testing.assert_close(quality.margins(images, texts, truth), expected)


def test_what_an_attribute_explains_is_the_variance_between_its_values() -> None:
    outputs = torch.tensor([[1.0, 0.0], [3.0, 0.0], [-1.0, 0.0], [-3.0, 0.0]])
    # Between the values 4 of each, within 1 of each: 16 / 20.
    assert quality.explained(outputs, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.8)
