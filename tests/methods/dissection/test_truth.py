"""Units whose concept is known are named right, shuffled ones are not, and what is named matters."""

from __future__ import annotations

from typing import Any

import planted
import pytest
import torch

import mm_adapters as mm
from methods_multimodal.dissection import (
    Concepts,
    Units,
    chance,
    clip_dissect,
    collect,
    network_dissection,
    shares,
)
from methods_multimodal.dissection.naming import JUDGE
from methods_multimodal.dissection.network import active_places
from methods_multimodal.dissection.scores import cell_iou
from methods_multimodal.dissection.similarity import cosine
from mm_adapters.zoo import labels, measures

N_IMAGES = 320
CONCEPTS = Concepts(labels.NAMES, labels.MEMBER_OF)


@pytest.fixture(scope="module")
def probe(tmp_path_factory: Any) -> dict[str, Any]:
    """tiny-clip with twenty planted neurons, its units, and what the probe pictures show."""
    model, judge = mm.load("tiny-clip"), mm.load("tiny-clip")
    chosen = planted.plant(model, planted.CONCEPTS)
    scenes = planted.scenes(N_IMAGES)
    batches = planted.batches(model, scenes)
    pairs = [(b, measures.images_of(scenes[64 * i : 64 * i + 64])) for i, b in enumerate(batches)]
    units = Units(model, planted.SITE)
    store = collect([units], pairs, judge, tmp_path_factory.mktemp("probe"), progress=False)
    texts = judge.embed(text=[labels.caption_of(name) for name in CONCEPTS.names])
    return {
        "units": units,
        "chosen": chosen,
        "batches": batches,
        "store": store,
        "masks": [labels.masks_of(scene) for scene in scenes],
        "texts": torch.nn.functional.normalize(texts.detach().float(), dim=-1),
    }


def test_network_dissection_names_planted_units(probe: dict[str, Any]) -> None:
    chosen = probe["chosen"]
    # One percent: half a percent of 64 patches a picture leaves a background too few places to be sure of.
    found = network_dissection(
        probe["units"], probe["batches"], probe["masks"], CONCEPTS, share=0.01, progress=False
    )
    named = [found.best()[unit][0] for unit in chosen]
    right = sum(a == b for a, b in zip(named, planted.CONCEPTS, strict=True))
    assert right >= 0.95 * len(chosen), list(zip(named, planted.CONCEPTS, strict=True))
    maps = torch.cat([probe["units"].maps(b) for b in probe["batches"]])
    score = cell_iou(active_places(maps, found.thresholds), shares(probe["masks"], CONCEPTS, (8, 8)))
    null = chance(score, N_IMAGES, n_shuffles=29)
    assert (null.p[chosen] < 0.01).all()


@pytest.mark.parametrize("kernel", ["wpmi", "cosine", "cosine_cubed"])
def test_clip_dissect_names_planted_units(kernel: str, probe: dict[str, Any]) -> None:
    found = clip_dissect(
        probe["store"], planted.SITE, probe["texts"], CONCEPTS.names, kernel=kernel, progress=False
    )
    named = [found.best()[unit][0] for unit in probe["chosen"]]
    right = sum(a == b for a, b in zip(named, planted.CONCEPTS, strict=True))
    assert right >= 0.9 * len(named), list(zip(named, planted.CONCEPTS, strict=True))


def test_soft_wpmi_names_planted_units_once_its_top_images_are_theirs(probe: dict[str, Any]) -> None:
    # An object's shape or colour is in one picture of eight: 100 top images would be mostly others.
    options = {"top_k": N_IMAGES // 16, "progress": False}
    found = clip_dissect(probe["store"], planted.SITE, probe["texts"], CONCEPTS.names, **options)
    named = [found.best()[unit][0] for unit in probe["chosen"]]
    right = sum(a == b for a, b in zip(named, planted.CONCEPTS, strict=True))
    assert right >= 0.9 * len(named), list(zip(named, planted.CONCEPTS, strict=True))


def test_planted_units_are_surer_than_chance_by_similarity_too(probe: dict[str, Any]) -> None:
    rows = probe["store"].rows()
    similarity = rows[JUDGE] @ probe["texts"].T
    null = chance(lambda order: cosine(similarity[order], rows[planted.SITE]), N_IMAGES, n_shuffles=49)
    assert (null.p[probe["chosen"]] < 0.01).all()


def test_units_of_shuffled_pictures_are_detectors_at_the_chance_rate(probe: dict[str, Any]) -> None:
    rows = probe["store"].rows()
    similarity = rows[JUDGE] @ probe["texts"].T
    made = torch.Generator().manual_seed(1)
    # Each unit of its own shuffle: a model whose units have nothing to do with the pictures.
    noise = torch.stack(
        [column[torch.randperm(N_IMAGES, generator=made)] for column in rows[planted.SITE].T], 1
    )
    null = chance(lambda order: cosine(similarity[order], noise), N_IMAGES, n_shuffles=199)
    rate = float((null.p <= 0.05).float().mean())
    assert abs(rate - 0.05) < 3 * (0.05 * 0.95 / noise.shape[1]) ** 0.5
    assert len(null.significant(0.05)) <= 0.01 * noise.shape[1]
