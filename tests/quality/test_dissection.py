"""A small part of `python -m tests.quality.dissection`: counts beside their nulls, and matched controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mm_adapters as mm
from tests.quality import dissection as quality

SITE = "vision.blocks.2.mlp.hook_post"


def test_units_without_a_meaning_are_detectors_at_the_chance_rate() -> None:
    found = quality.at_chance(160)
    assert found["share with p <= 0.05, shuffled"] == pytest.approx(0.05, abs=0.03)
    assert found["detectors, shuffled"] <= 0.01


def test_counts_stand_beside_those_of_random_weights_and_shuffled_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(quality.SITES, "tiny-clip", [SITE])
    found = {
        (row["method"], row["weights"]): row for row in quality.table("tiny-clip", 160, draws=1, seeds=1)
    }
    kinds = ("trained", "untrained", "weights shuffled", "labels shuffled")
    assert set(found) == {(method, kind) for method in quality.METHODS for kind in kinds}
    for method in quality.METHODS:
        row, untrained, labels = (found[method, kind] for kind in (kinds[0], kinds[1], kinds[3]))
        assert row["detectors"].mean >= 0.5 * row["units"].mean
        assert labels["detectors"].mean <= 0.02 * row["units"].mean
        # Random weights give detectors too; what they hardly give is scores above other random weights'.
        assert untrained["above random"].mean <= 0.05 * row["units"].mean
        assert row["AUROC"].mean >= row["one name for all"].mean + 0.05
    network = found["network", "trained"]
    assert network["above random"].mean > 2 * found["network", "untrained"]["above random"].mean


def test_an_untrained_twin_has_other_weights_and_the_same_shape() -> None:
    model, twin = mm.load("tiny-clip"), quality.untrained("tiny-clip", "tiny-clip", 1)
    ours, other = model.wrapped.state_dict(), twin.wrapped.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in other.items()}
    weight = "vision_model.encoder.layers.1.mlp.fc1.weight"
    assert not torch.allclose(ours[weight], other[weight], atol=1e-3)
    again = quality.untrained("tiny-clip", "tiny-clip", 1).wrapped.state_dict()
    assert all(torch.equal(other[k], again[k]) for k in other)


def test_controls_are_the_nearest_in_size_and_each_is_taken_once() -> None:
    size = torch.tensor([0.0, 1.0, 2.0, 0.1, 1.1, 2.1, 9.0])
    for seed in range(4):
        taken = quality.matched([0, 1, 2], [3, 4, 5, 6], size, np.random.default_rng(seed))
        assert sorted(taken) == [3, 4, 5]
    # With one other of its size, whoever takes first gets it.
    taken = {tuple(quality.matched([0, 3], [1, 6], size, np.random.default_rng(s))) for s in range(8)}
    assert all(sorted(one) == [1, 6] for one in taken)
