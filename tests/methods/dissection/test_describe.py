"""Units described in words: by tiny-llava, tested on retrieved pictures and on ones that tiny-sd draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import planted
import pytest
import torch
from PIL import Image

import mm_adapters as mm
from methods_multimodal.dissection import Units
from methods_multimodal.dissection.describe import (
    asking,
    describe,
    drawing,
    exemplar,
    mutual_information,
    retrieving,
)
from mm_adapters.zoo import measures

COLOURS = ("red", "green", "blue", "yellow")
PROMPT = "question: what colour is the object? answer:"


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    """tiny-clip with a neuron for each of four colours, and what they do on probe pictures."""
    model, judge = mm.load("tiny-clip"), mm.load("tiny-clip")
    chosen = planted.plant(model, COLOURS)
    units, scenes = Units(model, planted.SITE), planted.scenes(120)
    pictures = measures.images_of(scenes)

    def activation(some: Sequence[Image.Image]) -> torch.Tensor:
        return units.pooled({"text": ["a"], "images": list(some)}, "max")

    with torch.no_grad():
        seen = torch.nn.functional.normalize(judge.embed(images=pictures), dim=-1)
    return {
        "chosen": chosen,
        "judge": judge,
        "pictures": pictures,
        "seen": seen,
        "activation": activation,
        "baseline": activation(pictures),
    }


def strongest(probe: dict[str, Any], unit: int, n: int = 5) -> list[Image.Image]:
    return [probe["pictures"][i] for i in probe["baseline"][:, unit].topk(n).indices.tolist()]


def test_a_vision_language_model_says_what_planted_units_see(probe: dict[str, Any]) -> None:
    describer = asking(mm.load("tiny-llava"), PROMPT)
    illustrate = retrieving(
        probe["judge"], probe["pictures"], probe["seen"], n=6, template="a photo of a {} object"
    )
    said = [
        describe(unit, strongest(probe, unit), describer, illustrate, probe["activation"], probe["baseline"])
        for unit in probe["chosen"]
    ]
    assert [one.text for one in said] == list(COLOURS)
    assert all(one.scores[0] > 1 for one in said)  # A standard deviation above the probe.


def test_the_unit_itself_chooses_between_candidates(probe: dict[str, Any]) -> None:
    sd = mm.load("tiny-sd")
    sd.wrapped.set_progress_bar_config(disable=True)
    illustrate = drawing(
        sd, n=3, template="a {} circle on a white background", num_inference_steps=8, guidance_scale=3.0
    )
    unit = probe["chosen"][COLOURS.index("blue")]
    found = describe(
        unit,
        strongest(probe, unit),
        lambda pictures: ["red", "blue", "blue", " "],
        illustrate,
        probe["activation"],
        probe["baseline"],
    )
    assert found.candidates == ("blue", "red")
    assert found.scores[0] > found.scores[1] + 1
    with pytest.raises(mm.InputError, match="proposed nothing for the 5 exemplars"):
        describe(
            unit,
            strongest(probe, unit),
            lambda pictures: [""],
            illustrate,
            probe["activation"],
            probe["baseline"],
        )


def test_texts_likely_everywhere_are_put_behind_those_of_the_exemplars() -> None:
    made = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(4, 16, generator=made), dim=1)
    probe = torch.nn.functional.normalize(texts[0] + 0.3 * torch.randn(50, 16, generator=made), dim=1)
    own = torch.nn.functional.normalize(texts[0] + texts[2] + 0.1 * torch.randn(5, 16, generator=made), dim=1)
    found = mutual_information(own, probe, texts, weight=1.0, scale=10.0)
    assert int(found.argmax()) == 2
    given = torch.log(torch.softmax(10 * own.double() @ texts.double().T, 1))
    anywhere = torch.softmax(10 * probe.double() @ texts.double().T, 1)
    slow = torch.stack([given[:, t].mean() - torch.log(anywhere[:, t].mean()) for t in range(4)])
    torch.testing.assert_close(found.double(), slow, rtol=1e-4, atol=1e-5)


def test_an_exemplar_is_bright_where_the_unit_is_active() -> None:
    map_ = torch.zeros(8, 8)
    map_[2:4, 2:4] = 1.0
    shown = exemplar(Image.new("RGB", (64, 64), "white"), map_, 0.5)
    assert shown.getpixel((24, 24)) == (255, 255, 255)
    assert max(shown.getpixel((56, 56))) < 128  # type: ignore[arg-type]
