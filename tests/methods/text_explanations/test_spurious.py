"""A probe that leans on the background is repaired by the heads that the method names."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.core.embed import embed_texts
from methods_multimodal.text_explanations.ablation import (
    Component,
    ablate,
    ablation,
    components_of,
    outputs,
)
from methods_multimodal.text_explanations.components import align, rank_components, stacked
from methods_multimodal.text_explanations.decomposition import Decomposition, decompose
from methods_multimodal.text_explanations.spurious import find_shortcut, group_accuracy, repaired
from methods_multimodal.text_explanations.vocabulary import vocabulary
from mm_adapters.zoo import world
from mm_adapters.zoo.measures import images_of
from tests.methods.text_explanations.test_name_heads import explained

SHAPES, GROUNDS = world.SHAPES, tuple(world.BACKGROUNDS)


@cache
def clip() -> mm.HookedModel:
    return mm.load("tiny-clip")


def texts(attribute: str) -> Tensor:
    return embed_texts(clip(), vocabulary("world").of([attribute]).texts)


@cache
def data(split: str, spurious: float, n: int) -> tuple[Decomposition, Tensor, Tensor]:
    """Images, their label (which the background gives away while it can), and label and background as one."""
    scenes = [world.scene(i, split, kind="one", spurious=spurious) for i in range(n)]
    pixels = clip().prepare(images=images_of(scenes))["pixel_values"]
    found = decompose(clip(), images=pixels, tokens="sum", batch_size=100)
    labels = torch.tensor([SHAPES.index(s.things[0].shape) % len(GROUNDS) for s in scenes])
    grounds = torch.tensor([GROUNDS.index(s.background) for s in scenes])
    return found, labels, labels * len(GROUNDS) + grounds


def test_ablating_the_heads_it_names_raises_the_worst_group_and_keeps_the_average() -> None:
    train, labels, _ = data("train", 0.97, 400)
    probe = LogisticRegression(C=0.01, max_iter=2000).fit(train.total.numpy(), labels.numpy())
    classes = torch.tensor(probe.coef_, dtype=torch.float32)
    bias = torch.tensor(probe.intercept_, dtype=torch.float32)
    # Chosen on training images from words alone; the test images' labels and groups only measure.
    repair = find_shortcut(train, spurious=texts("background"), core=texts("shape"))
    test, true, groups = data("test", 0.0, 300)
    before = group_accuracy(test.total, classes, true, groups, bias)
    after = group_accuracy(repaired(test, repair, train), classes, true, groups, bias)
    assert before.worst < 0.3  # It did lean on the background.
    assert after.worst - before.worst >= 0.20
    # Three points, and one standard error of so few images.
    assert after.average >= before.average - 0.03 - 0.016
    alike, true, groups = data("validation", 0.97, 150)  # Where the shortcut holds, little is lost.
    with_it = group_accuracy(alike.total, classes, true, groups, bias)
    without = group_accuracy(repaired(alike, repair, train), classes, true, groups, bias)
    # Three points, and one standard error of so few images.
    assert without.average >= with_it.average - 0.03 - 0.016
    assert 0 < len(repair.components) < 12


def test_ranking_by_a_property_puts_first_what_the_worlds_truth_says_carries_it() -> None:
    found, _, _ = data("test", 0.0, 300)
    heads = [c for c in rank_components(found, texts("background")).components() if c.head is not None]
    scenes = [world.scene(i, "test", kind="one") for i in range(300)]
    first = outputs(found, heads[0]).numpy()
    assert explained(first, scenes, "background") >= 0.8
    assert explained(first, scenes, "shape") <= 0.2
    scores = rank_components(found, texts("shape"))
    # Scores are shares of the property's variance, so over all components they sum to one.
    assert float(scores.scores.sum()) == pytest.approx(1.0, abs=1e-3)


def test_a_tower_without_a_joint_space_is_aligned_with_one_and_ranked_alike() -> None:
    """The vision tower alone, before its projection, has no texts; aligned to the CLIP it has."""
    clip_found, _, _ = data("test", 0.0, 300)
    alone = mm.wrap(clip().wrapped.vision_model)
    scenes = [world.scene(i, "test", kind="one") for i in range(300)]
    pixels = clip().prepare(images=images_of(scenes))["pixel_values"]
    found = decompose(alone, images=pixels, tokens="sum", batch_size=100).unit()
    alignment = align(found, clip_found.own, epochs=200)
    assert alignment.cosine > 0.95
    own = rank_components(found, texts("colour"), alignment=alignment).components(4)
    there = rank_components(clip_found, texts("colour")).components(4)
    assert len(set(own) & set(there)) >= 3
    with pytest.raises(mm.InputError, match="align the components"):
        rank_components(found, torch.zeros(2, 7))


def test_ablations_are_what_they_say() -> None:
    found, _, _ = data("test", 0.0, 300)
    which = [Component(2, 2), Component(1), Component(-1)]
    parts = sum(outputs(found, c) for c in which)
    assert isinstance(parts, Tensor)
    torch.testing.assert_close(ablate(found, which, "zero"), found.total - parts, rtol=1e-4, atol=1e-4)
    mean = ablate(found, which, "mean")
    torch.testing.assert_close(mean.mean(0), found.total.mean(0), rtol=1e-4, atol=1e-4)
    one = ablate(found, which, "resample", seed=torch.Generator().manual_seed(1))
    two = ablate(found, which, "resample", seed=1)
    assert torch.equal(one, two)
    torch.testing.assert_close((one - found.total + parts).mean(0), parts.mean(0), rtol=1e-4, atol=1e-4)
    everything = stacked(found).sum(1) + found.bias + found.pool
    torch.testing.assert_close(everything, found.total, rtol=1e-4, atol=1e-4)
    assert len(components_of(found)) == 4 * 4 + 5
    shape = texts("shape")
    truth = torch.tensor(
        [SHAPES.index(world.scene(i, "test", kind="one").things[0].shape) for i in range(300)]
    )
    late = [Component(3, h) for h in range(4)] + [Component(3)]
    result = ablation(found, late, shape, truth)
    assert result.before > 0.95
    assert result.after < result.before - 0.2
    early = ablation(found, [Component(0, h) for h in range(4)], shape, truth)
    assert early.after > early.before - 0.05
    with pytest.raises(mm.InputError, match="no head 9"):
        outputs(found, Component(9, 0))
