"""A small part of `python -m tests.quality.probing`: tiny-clip's picture tower beside every null."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import mm_adapters as mm
from methods_multimodal.probing import probe_features, read_features
from tests.quality import probing as quality
from tests.quality import probing_data as data

SITES = "vision.blocks.3.hook_resid_post"


def test_what_is_in_the_picture_is_read_above_every_null_and_what_is_not_is_at_chance() -> None:
    part = replace(quality.PARTS["tiny-clip-vision"], sites=SITES, roles=("class",), kinds=("one",))
    sheets = quality.sheets(part, 240, 1)
    rows = {row["variable"]: row for row in quality.rows_of(sheets)}
    for variable in ("shape", "colour", "position"):
        row = rows[variable]
        assert row["task"].low > 0.6, variable
        assert row["selectivity"].low > 0.1, variable
        assert row["above the twin"].low > 0.2, variable
        assert row["shuffled"].low <= 1 / row["classes"] <= row["shuffled"].high + 0.05
    # Random weights do not lose the background: what covers most of the picture is in any mean of it.
    assert rows["background"]["twin"].mean > 0.9


def test_of_variables_in_no_picture_nineteen_in_twenty_intervals_cover_chance() -> None:
    asked = data.asked(data.pictures, "one", 240, 0)
    rows = read_features(mm.load("tiny-clip"), asked.batches, sites=[SITES], roles=("class",))
    lots = np.random.default_rng(0).integers(4, size=(20, 240))
    sheet = probe_features(rows, {f"lot {i}": lot for i, lot in enumerate(lots)}, strengths=(0.01, 1.0))
    low, high = sheet.interval().flatten(1)
    assert float(((low <= 0.25) & (high >= 0.25)).double().mean()) >= 0.85
    assert float(sheet.accuracy().mean()) == pytest.approx(0.25, abs=0.03)


def test_scenes_have_the_values_that_their_pictures_and_texts_show() -> None:
    scenes = data.scenes_of("two", 20, 0)
    for scene, relation in zip(scenes, data.values_of("two", scenes, 0)["relation"], strict=True):
        first, second = data.in_order(scene)
        assert data.caption_of("two", scene).startswith(
            f"a{'n' if first.colour[0] in 'aeiou' else ''} {first.colour}"
        )
        dx, dy = second.x - first.x, second.y - first.y
        known = ("left of" if dx > 0 else "right of") if abs(dx) > abs(dy) else "above" if dy > 0 else "below"
        assert relation == known
    many = data.scenes_of("many", 10, 0)
    counts = data.values_of("many", many, 0)["count"]
    assert all(caption.startswith(count) for caption, count in zip(map(_many, many), counts, strict=True))


def _many(scene: data.Scene) -> str:
    return data.caption_of("many", scene)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sd"])
def test_an_untrained_twin_has_other_weights_in_every_tower(name: str) -> None:
    twin, again = data.untrained(name, 1), data.untrained(name, 1)
    model = mm.load(name)
    for tower in ("text", "vision" if name == "tiny-clip" else "denoiser"):
        own, other, third = (list(m.check_tower(tower).module.parameters()) for m in (model, twin, again))
        weights = [i for i, w in enumerate(own) if w.ndim > 1]
        assert not any(torch.equal(own[i], other[i]) for i in weights)
        assert all(torch.equal(a, b) for a, b in zip(other, third, strict=True))
