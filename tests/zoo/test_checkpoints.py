"""The shipped checkpoints open in plain libraries, are small, and really learned the world."""

import json

import numpy as np
import pytest
from PIL import Image

import mm_adapters.zoo as zoo
from mm_adapters.zoo import drawing, evaluate, judges, measures, questions, samples, world

MB = 1_000_000


@pytest.fixture(scope="module")
def clip():
    return evaluate.load(zoo.path("tiny-clip"), "tiny-clip")


@pytest.fixture(scope="module")
def llava():
    return evaluate.load(zoo.path("tiny-llava"), "tiny-llava")


@pytest.fixture(scope="module")
def sd():
    return evaluate.load(zoo.path("tiny-sd"), "tiny-sd")[0]


def test_tiny_clip_knows_each_attribute_of_one_object(clip):
    scenes = [world.scene(i, "test", seed=11, kind="one") for i in range(200)]
    images = measures.images_of(scenes)
    for attribute in measures.ATTRIBUTES:
        said = measures.classify(*clip, images, attribute)
        right = [word == measures.value_of(s, attribute) for word, s in zip(said, scenes, strict=True)]
        assert np.mean(right) >= 0.97, attribute


def test_tiny_clip_tells_swapped_colours_apart(clip):
    crossed = measures._crossed("colour", "relation", ["colour", "shape"])
    made = measures._choose_caption(*clip, "colours swapped", crossed, 200, 0.88)
    assert made.passes(), made


def test_tiny_llava_answers_and_needs_the_image(llava):
    cases = [questions.question(i, "test", seed=11) for i in range(150)]
    images, asked = measures.images_of([s for s, _ in cases]), [q for _, q in cases]

    def score(pictures) -> float:
        said = measures.answers(*llava, pictures, asked)
        return float(np.mean([a == q.answer for a, q in zip(said, asked, strict=True)]))

    # The bound of the card, less three standard errors of so few questions.
    assert score(images) >= 0.95 - 3 * (0.95 * 0.05 / len(cases)) ** 0.5
    assert score(images[1:] + images[:1]) < 0.3


def test_tiny_sd_draws_what_the_prompt_says(sd):
    cases = drawing.prompts_to_draw(12)
    images = drawing.draw(sd, [text for _, text in cases], steps=15)
    seen = [judges.judge(np.asarray(image)) for image in images]
    right = [
        getattr(what, attribute) == measures.value_of(scene, attribute)
        for what, (scene, _) in zip(seen, cases, strict=True)
        for attribute in measures.ATTRIBUTES
    ]
    # The card's worst is 93 %; less three standard errors of so few checks.
    assert np.mean(right) >= 0.93 - 3 * (0.93 * 0.07 / len(right)) ** 0.5


def test_pixel_rules_are_right_about_rendered_scenes():
    scenes = [world.scene(i, "test", seed=12, kind="one", solid=True) for i in range(60)]
    for scene in scenes:
        seen = judges.judge(world.render(scene))
        for attribute in measures.ATTRIBUTES:
            assert getattr(seen, attribute) == measures.value_of(scene, attribute)


def test_checkpoints_are_small_and_hold_nothing_pickled():
    total = 0
    for name in zoo.NAMES:
        files = [file for file in zoo.path(name).rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        total += size
        assert size < 12 * MB, name
        assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".md", ".png", ".jinja"}
    assert total < 30 * MB


def _recorded():
    for name in zoo.NAMES:
        for fact in json.loads((zoo.path(name) / "metrics.json").read_text("utf-8")):
            yield pytest.param(name, fact, id=f"{name}: {fact['name']}")


@pytest.mark.parametrize(("name", "fact"), list(_recorded()))
def test_recorded_numbers_meet_their_bounds(name, fact):
    assert measures.Measure(**fact).passes(), (name, fact)


def test_sample_images_are_the_scenes_they_are_named_after():
    files = zoo.sample_images()
    assert files.keys() == samples.SAMPLES.keys()
    for name, file in files.items():
        with Image.open(file) as image:
            assert np.array_equal(np.asarray(image), world.render(samples.SAMPLES[name], samples.SIZE_PX))


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="no model 'tiny-dit'; there is tiny-clip"):
        zoo.path("tiny-dit")
