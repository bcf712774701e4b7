"""The world is what it says it is."""

import numpy as np
import pytest

from mm_adapters.zoo import sd, world


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.scene(i, "test") for i in range(200)]


def test_scene_is_a_pure_function_of_its_number():
    first = [world.scene(i, "test", seed=3) for i in (5, 2, 9)]
    again = [world.scene(i, "test", seed=3) for i in (9, 5, 2)]
    assert first == [again[1], again[2], again[0]]
    assert np.array_equal(world.render(first[0]), world.render_batch(again)[1])


def test_splits_share_no_image():
    seen = {}
    for split in world.SPLITS:
        for image in world.render_batch([world.scene(i, split) for i in range(300)]):
            assert seen.setdefault(image.tobytes(), split) == split


def test_held_out_pairs_are_only_in_the_novel_split(scenes):
    for split in ("train", "validation", "test"):
        pairs = {(t.shape, t.colour) for i in range(300) for t in world.scene(i, split).things}
        assert not pairs & set(world.HELD_OUT_PAIRS)
    novel = {(t.shape, t.colour) for i in range(100) for t in world.scene(i, "novel").things}
    assert novel == set(world.HELD_OUT_PAIRS)


def test_every_value_occurs():
    things = [t for i in range(1500) for t in world.scene(i).things]
    assert {t.shape for t in things} == set(world.SHAPES)
    assert {t.colour for t in things} == set(world.COLOURS)
    assert {t.texture for t in things} == set(world.TEXTURES)
    assert {t.position for t in things} == set(world.POSITIONS)
    assert {len(world.scene(i).things) for i in range(500)} == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("size_px", [64, 160])
def test_masked_pixels_have_the_object_s_colour_and_the_rest_the_background_s(scenes, size_px):
    for scene in scenes[:60]:
        image = world.render(scene, size_px).astype(int)
        index = world.index_map(scene, size_px)
        grown = world.index_map(scene, size_px) > 0
        # The edge is one pixel wide, but at a sharp tip it reaches a little further.
        for axis in (0, 1) * (2 if size_px == 64 else 4):
            grown |= np.roll(grown, 1, axis) | np.roll(grown, -1, axis)
        assert (image[~grown] == scene.background_rgb).all()
        for number, thing in enumerate(scene.things, start=1):
            # Away from the edge no pixel is a mixture with the background.
            inner = index == number
            for axis in (0, 1):
                inner = inner & np.roll(inner, 1, axis) & np.roll(inner, -1, axis)
            if thing.texture == "solid" and size_px == 160:
                assert np.abs(image[inner] - thing.rgb).max() <= 1
            nearest = min(
                world.COLOURS,
                key=lambda c: np.abs(np.quantile(image[inner], 0.5, axis=0) - world.COLOURS[c]).sum(),
            )
            assert thing.texture != "solid" or nearest == thing.colour


def test_masks_do_not_overlap_and_are_covered_by_the_image(scenes):
    for scene in scenes:
        covered = world.masks(scene)
        assert covered.sum(0).max() == 1
        assert (covered.sum((1, 2)) > 30).all()


def test_positions_and_relations_hold_for_the_masks_centres(scenes):
    for scene in scenes:
        centres = [(np.nonzero(m)[1].mean(), np.nonzero(m)[0].mean()) for m in world.masks(scene)]
        for thing, (x, y) in zip(scene.things, centres, strict=True):
            column, row = (
                ("left", "", "right")[int(x > 23) + int(x > 41)],
                ("top", "", "bottom")[int(y > 23) + int(y > 41)],
            )
            assert thing.position == (f"{row} {column}".strip() or "middle")
        if scene.kind == "two":
            (ax, ay), (bx, by) = centres
            truth = {
                "left of": bx - ax > 20,
                "right of": ax - bx > 20,
                "above": by - ay > 20,
                "below": ay - by > 20,
            }
            assert sum(truth.values()) == 1
            for relation, holds in truth.items():
                assert world.holds(relation, *scene.things) == holds


def test_sizes_differ_in_area(scenes):
    area = {size: [] for size in world.SIZES}
    for scene in scenes:
        for thing, mask in zip(scene.things, world.masks(scene), strict=True):
            area[thing.size].append(mask.sum() / world.shape_mask(thing.shape, 32.0, 32.0, 10.5).sum())
    assert max(area["small"]) < 0.85
    assert min(area["large"]) > 1.2


def test_spurious_background_follows_the_shape():
    def agree(spurious: float) -> float:
        scenes = [world.scene(i, kind="one", spurious=spurious) for i in range(600)]
        tied = [tuple(world.BACKGROUNDS)[world.SHAPES.index(s.things[0].shape) % 4] for s in scenes]
        return float(np.mean([s.background == t for s, t in zip(scenes, tied, strict=True)]))

    assert agree(1.0) == 1.0
    assert agree(0.8) == pytest.approx(0.85, abs=0.05)
    assert agree(0.0) == pytest.approx(0.25, abs=0.06)


def test_training_examples_of_tiny_sd_are_a_finite_list():
    image, caption = sd.training_example(7)
    assert (image.shape == (64, 64, 3) and "of" in caption) or "above" in caption or "below" in caption
    assert np.array_equal(image, sd.training_example(7)[0])
    with pytest.raises(IndexError, match="24576"):
        sd.training_example(sd.N_TRAINING)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="no split 'dev'"):
        world.scene(0, "dev")
