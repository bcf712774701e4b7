"""Probes that see a part of the rows at a time end where those end that see all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from methods_multimodal.probing import (
    Features,
    Place,
    fit_probe,
    fit_streamed,
    predict_streamed,
    probe_features,
    streamed,
)
from mm_adapters.store import Column, Store, Writer

RNG = np.random.default_rng(2)
ROWS = torch.from_numpy(RNG.standard_normal((200, 6)) * 3 + 5).float()
IDS = (ROWS[:, 0] > 5).long().numpy() + (
    ROWS[:, 1] + torch.from_numpy(RNG.standard_normal(200)) > 6
).long().numpy()
TRAIN, VALIDATION = torch.arange(0, 200, 2), torch.arange(1, 200, 2)


def parts() -> Iterator[torch.Tensor]:
    yield from ROWS.split(33)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_they_reach_the_same_probabilities(n_classes: int) -> None:
    ids = np.minimum(IDS, n_classes - 1)
    for strength in (0.01, 1.0):
        whole = fit_probe(ROWS, ids, train=TRAIN, strengths=[strength])
        fitted = fit_streamed(parts, ids, train=TRAIN, strengths=[strength])
        torch.testing.assert_close(fitted.centre, whole.centre)
        torch.testing.assert_close(
            fitted.logits(ROWS).softmax(1), whole.logits(ROWS).softmax(1), atol=5e-3, rtol=0
        )


def test_an_mlp_learns_what_it_is_trained_on() -> None:
    signs = torch.from_numpy(RNG.choice([-1.0, 1.0], (200, 3)))
    xor = (signs[:, 0] * signs[:, 1] > 0).long().numpy()
    fitted = fit_streamed(lambda: iter(signs.split(64)), xor, train=TRAIN, strengths=[1.0], head="mlp")
    assert (predict_streamed(lambda: iter(signs.split(64)), fitted).numpy() == xor).mean() == 1.0


def test_a_sheet_of_a_store_that_is_too_large_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place("text.blocks.0.hook_resid_post", "mean")
    with Writer(tmp_path / "s", {place.column: Column((6,), torch.float32)}) as writer:
        for part in parts():
            writer.append({place.column: part})
    labels = {"level": IDS}
    options: dict[str, Any] = {"strengths": [0.1], "seed": 1}
    whole = probe_features(Features({place.column: ROWS}), labels, **options)
    stored = probe_features(Features(Store(tmp_path / "s")), labels, **options)
    assert torch.equal(stored.right, whole.right)
    monkeypatch.setattr(streamed, "MOST_BYTES", 100)
    monkeypatch.setattr(
        streamed, "fit_probe", lambda *args, **options: pytest.fail("it took all rows at once")
    )
    in_parts = probe_features(Features(Store(tmp_path / "s")), labels, **options)
    assert float((in_parts.right != whole.right).double().mean()) <= 0.02
