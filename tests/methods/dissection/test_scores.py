"""Chance, held-out prediction and neuron statistics against planted truths and other libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from methods_multimodal.core.statistics import auroc, correlation
from methods_multimodal.dissection import (
    agreement,
    chance,
    faithfulness,
    falcon,
    multimodal_neurons,
    selectivity,
)
from methods_multimodal.dissection.neurons import contribution
from methods_multimodal.dissection.scores import cell_iou
from methods_multimodal.dissection.similarity import cosine
from mm_adapters import InputError


def test_auroc_equals_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    activations = rng.integers(0, 6, (80, 3)).astype(np.float32)
    present = rng.random((80, 4)) < 0.3
    found = auroc(torch.from_numpy(activations), torch.from_numpy(present))
    for unit in range(3):
        for concept in range(4):
            wanted = roc_auc_score(present[:, concept], activations[:, unit])
            assert float(found[unit, concept]) == pytest.approx(wanted, abs=1e-6)
    assert torch.isnan(auroc(torch.from_numpy(activations), torch.ones(80, 1, dtype=torch.bool))).all()


def test_correlation_equals_numpy() -> None:
    a, b = torch.randn(50, 2), torch.randn(50, 3)
    wanted = np.corrcoef(a.T.numpy(), b.T.numpy())[:2, 2:]
    np.testing.assert_allclose(correlation(a, b).numpy(), wanted, atol=1e-6)


def test_shuffled_activations_are_significant_at_the_chance_rate_only() -> None:
    made = torch.Generator().manual_seed(0)
    similarity = torch.randn(60, 12, generator=made)
    activations = torch.randn(60, 300, generator=made)
    activations[:, 0] = similarity[:, 5] + 0.3 * torch.randn(60, generator=made)
    found = chance(lambda order: cosine(similarity[order], activations), 60, n_shuffles=199)
    assert float(found.p[0]) < 0.01
    assert found.significant(0.05)[:1] == [0]
    # 299 units that follow nothing: the share below 0.05 is 0.05, give or take three standard errors.
    share = float((found.p[1:] <= 0.05).float().mean())
    assert abs(share - 0.05) < 3 * (0.05 * 0.95 / 299) ** 0.5
    assert len(found.significant(0.05)) <= 3


def test_cell_iou_is_iou_where_masks_fill_whole_cells() -> None:
    made = torch.Generator().manual_seed(0)
    active = torch.rand(7, 3, 4, 4, generator=made) < 0.3
    covered = (torch.rand(7, 5, 4, 4, generator=made) < 0.4).float()
    order = torch.randperm(7, generator=made)
    found = cell_iou(active, covered)(order)
    for unit in range(3):
        for concept in range(5):
            on, under = active[:, unit], covered[order][:, concept].bool()
            wanted = (on & under).sum() / (on | under).sum()
            assert float(found[unit, concept]) == pytest.approx(float(wanted), abs=1e-6)


def test_faithfulness_beats_the_constant_name_only_where_names_are_right() -> None:
    present = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    activations = present.float() + 0.01 * torch.randn(200, 3)
    right = faithfulness(["a", "b", "c"], activations, present, ["a", "b", "c"])
    assert (right.auroc > 0.99).all()
    wrong = faithfulness(["b", "c", "a"], activations, present, ["a", "b", "c"])
    assert float(wrong.auroc.mean()) < 0.65
    same = faithfulness(["a", "a", "a"], activations, present, ["a", "b", "c"])
    assert float(same.constant.mean()) < float(right.auroc.mean()) - 0.2
    assert same.constant_name in ("a", "b", "c")


def test_agreement_is_the_share_of_equal_names() -> None:
    table = agreement({"x": ["a", "b", "c", "d"], "y": ["a", "b", "q", "d"], "z": ["q"] * 4})
    assert table.tolist() == [[1.0, 0.75, 0.0], [0.75, 1.0, 0.25], [0.0, 0.25, 1.0]]


def test_selectivity_of_planted_units() -> None:
    classes = ["photo"] * 5 + ["drawing"] * 5
    activations = torch.zeros(10, 4)
    activations[:5, 0] = 2.0  # Photos only.
    activations[:, 1] = 1.0  # Everything.
    activations[:, 2] = torch.tensor([1.0] * 5 + [3.0] * 5)
    found = selectivity(activations, classes)
    torch.testing.assert_close(found.index, torch.tensor([1.0, 0.0, 0.5, 0.0]))
    assert (found.preferred[0], found.preferred[2]) == ("photo", "drawing")
    assert found.dead.tolist() == [False, False, False, True]
    with pytest.raises(InputError, match="Selectivity compares classes"):
        selectivity(activations, ["one"] * 10)


def test_multimodal_neurons_need_both_the_picture_and_the_word() -> None:
    shown = torch.rand(120, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    said = torch.rand(90, 2, generator=torch.Generator().manual_seed(1)) < 0.5
    on_images = torch.stack([shown[:, 0].float(), shown[:, 1].float(), torch.rand(120)], 1)
    on_texts = torch.stack([said[:, 0].float(), torch.rand(90), said[:, 1].float()], 1)
    found = multimodal_neurons(on_images, shown, on_texts, said, ["red", "circle"])
    assert [(unit, name) for unit, name, _ in found.pairs(0.9)] == [(0, "red")]


def test_contribution_is_what_the_unit_writes_along_the_direction() -> None:
    activations, out, direction = torch.randn(4, 6), torch.randn(6, 8), torch.randn(8)
    whole = activations @ out @ direction
    torch.testing.assert_close(contribution(activations, out, direction).sum(1), whole)


def test_falcon_finds_planted_groups_and_drops_what_quiet_images_share() -> None:
    made = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(6, 64, generator=made), dim=1)
    names = ["cat", "dog", "grass", "car", "sky", "road"]
    base = 0.05 * torch.rand(200, 400, generator=made)
    base[:, 390:] += 0.1  # What all the images share, and the quiet ones are near by.
    embeddings = texts[2].repeat(200, 1) + 0.05 * torch.randn(200, 64, generator=made)
    base[:20, [3, 7]] = 3.0
    embeddings[:20] += texts[0]
    base[20:22, 9] = 3.0  # Too few images.
    found = falcon(base, torch.nn.functional.normalize(embeddings, dim=1), texts, names)
    assert [group.units for group in found] == [(3, 7)]
    assert found[0].images == tuple(range(20))
    assert found[0].words[0][0] == "cat"
    assert "grass" in found[0].dropped
    assert found[0].coherence > 0.8
