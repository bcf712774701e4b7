"""A small part of `python -m tests.quality.cross_attention`: rows, nulls and rules say what they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import mm_adapters as mm
from mm_adapters.zoo import world
from tests.quality import cross_attention as quality
from tests.quality import prompts, word_maps, word_recipes
from tests.quality.rows import markdown, row

OPTIONS: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def model() -> mm.HookedModel:
    loaded = mm.load("tiny-sd")
    loaded.wrapped.set_progress_bar_config(disable=True)
    return loaded


def test_the_nouns_map_is_told_from_its_nulls_by_the_same_pictures(model: mm.HookedModel) -> None:
    rows, facts = word_maps.measure_maps(model, 4, 4, 1, OPTIONS)
    by_name = {one.what: one for one in rows if one is not None}
    assert facts["chosen"] == max(facts["noun less “in” on validation"].items(), key=lambda pair: pair[1])[0]
    (noun,) = (one for name, one in by_name.items() if name.startswith("relative") and "noun" in name)
    assert noun.value.mean > noun.nulls["another prompt's noun, the same noise"].mean
    assert noun.nulls["nothing marked"].mean == 0
    # Everything marked is the drawn object's share of the picture, whatever the recipe.
    pictures = word_maps.drawn(model, prompts.one_object(4, "test"), 1, OPTIONS)
    areas = [float(p.region.float().mean()) for p in pictures if p.region is not None]
    shares = [one.nulls["everything marked"].mean for name, one in by_name.items() if "noun" in name]
    assert shares == pytest.approx([np.mean(areas)] * len(word_maps.RECIPES), abs=1e-6)
    assert len(by_name) == len(word_maps.RECIPES) * (len(word_maps.KINDS) - 1)


def test_everything_from_a_word_on_is_the_other_prompt_and_said_to_be(model: mm.HookedModel) -> None:
    rows, facts = quality.measure_patching(model, "shape", 2, 1, OPTIONS)
    n_same, n_alike = facts["the whole is the other prompt"]
    assert n_same == n_alike > 0
    by_name = {one.what: one for one in rows if one is not None}
    whole = by_name["shape flips: the word and all after it"]
    assert f"{n_same} of {n_alike}" in whole.note
    assert "by construction" in whole.note
    assert whole.value.mean == by_name["shape flips: the other prompt"].value.mean
    assert all(one.nulls for name, one in by_name.items() if not name.endswith("the other prompt"))


def test_a_blocked_word_is_beside_another_of_as_many_tokens(model: mm.HookedModel) -> None:
    rows, facts = quality.measure_knockout(model, "background", 1, 1, OPTIONS)
    assert facts["prompts without a matched word"] == 0
    if facts["pictures with the attribute"]:
        assert all(one is not None and one.above is not None for one in rows)


def test_a_rows_interval_is_over_prompts_and_its_difference_is_paired() -> None:
    nan = float("nan")
    own = [[0.5 + i, 0.7 + i] for i in range(20)] + [[nan, nan]]
    null = [[0.2 + i, nan] for i in range(20)] + [[9.0, 9.0]]
    found = row("a", own, {"b": null}, "as it is")
    assert found is not None
    assert found.value.mean == pytest.approx(10.1)
    assert found.n == 20
    assert found.value.low < 8 < 12 < found.value.high
    # Only the first draws are pairs: 0.3 apart, whichever prompts are drawn.
    assert found.above is not None
    assert (found.above.mean, found.above.low, found.above.high) == pytest.approx((0.3, 0.3, 0.3), abs=1e-6)
    assert row("a", [[nan]], {"b": [[1.0]]}) is None
    (line,) = (text for text in markdown("t", [found, None]).splitlines() if text.startswith("| a"))
    assert line.startswith("| a *(as it is)* | 10.10 (")
    assert "| +0.30 (+0.30 to +0.30) | 20 |" in line


def test_two_objects_are_found_by_their_colours_where_they_are() -> None:
    found = 0
    for scene, text in prompts.two_objects(6, "test"):
        image = torch.from_numpy(world.render(scene)).permute(2, 0, 1).float() / 255
        colours = tuple(thing.colour for thing in scene.things)
        assert all(thing.colour in text and thing.shape in text for thing in scene.things)
        regions = prompts.regions_by_colour(image, colours)
        if regions is None:  # A colour as dark as its background.
            continue
        found += 1
        for where, mask in zip(regions, world.masks(scene), strict=True):
            assert (where.numpy() & mask).sum() / (where.numpy() | mask).sum() > 0.75
        others = next(c for c in world.COLOURS if c not in colours)
        assert prompts.regions_by_colour(image, (colours[0], others)) is None
    assert found >= 3


def test_a_replaced_word_has_its_article() -> None:
    assert prompts.swap("a red ring on a white background", "red", "orange").startswith(
        "an orange ring on a w"
    )
    assert prompts.swap("an orange ring", "orange", "red") == "a red ring"
    assert prompts.swap("a small red ring on a gray background", "gray", "black").endswith(
        "on a black background"
    )


def test_every_way_of_setting_maps_against_the_others_is_tried(
    model: mm.HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mm, "load", lambda name: model)
    found = word_recipes.main(["tiny-sd", "--n", "3", "--steps", "4"])
    assert len(found) == 23
    # What the package calls "relative" and "spread" are two of them.
    cases = prompts.one_object(3, "validation")
    inputs = {"prompt": [t for _, t in cases], "seed": [0, 1, 2], "output_type": "pt"} | OPTIONS
    inputs["num_inference_steps"] = 4
    words = [word_maps.words_of(scene) for scene, _ in cases]
    maps, _ = word_maps.word_maps(model, inputs, words=words, keep=("head",), spread=True)
    formed = dict(word_recipes.formed(maps))
    for recipe, way in (("relative", "standardised log share, spread 0"), ("spread", "nothing, spread 4")):
        torch.testing.assert_close(maps.at(recipe), formed[f"{way} times"], rtol=1e-3, atol=1e-4)
