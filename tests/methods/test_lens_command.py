"""`mm-interp lens` on each model of the zoo: what it writes is what the models themselves say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mm_adapters as mm
from methods_multimodal.report._lens import lens_report
from mm_adapters import cli
from mm_adapters.zoo import sample_images


def run(out: Path, *words: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli.build(), ["lens", *words, "--out", str(out)])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    with Image.open(out) as image:
        assert image.size[0] > 400
    return json.loads(out.with_suffix(".json").read_text())


def test_of_a_model_that_answers(tmp_path: Path) -> None:
    numbers = run(tmp_path / "l.png", "--model", "tiny-llava", "--text", "red", "--text", "blue")
    assert [line[0]["token"] for line in numbers["top"][-2:]] == [" red", " red"]
    assert numbers["own_gap"] == 0.0
    assert numbers["candidates"] == [" red", " blue"]
    maps = torch.tensor(numbers["maps"])
    assert maps.shape == (64, 5, 2)
    report = lens_report(mm.load("tiny-llava"), texts=["blue"])
    titles = [ax.get_title() for ax in report.figure.axes]
    assert "logit lens: ' blue'" in titles


def test_of_a_contrastive_model_the_last_layer_is_its_own_cosine(tmp_path: Path) -> None:
    image = sample_images()["red_circle"]
    numbers = run(
        tmp_path / "l.png",
        "--model",
        "tiny-clip",
        "--image",
        str(image),
        "--text",
        "a red circle",
        "--text",
        "x",
    )
    model = mm.load("tiny-clip")
    output = model.wrapped(**model.prepare(images=[image], text=["a red circle", "x"]))
    own = output.logits_per_image / model.wrapped.logit_scale.exp()
    torch.testing.assert_close(torch.tensor(numbers["cosines"][-1]), own[0].detach(), atol=2e-6, rtol=0)


def test_of_a_pipeline_the_last_layer_is_its_own_picture(tmp_path: Path) -> None:
    numbers = run(tmp_path / "l.png", "--model", "tiny-sd", "--prompt", "a red circle", "--steps", "2")
    changes = numbers["mean change of a pixel from the last"]
    assert changes[-1] == 0
    assert min(changes[:-1]) > 0


def test_one_tower_alone_is_refused() -> None:
    model = mm.wrap(mm.load("tiny-clip").wrapped.vision_model)
    with pytest.raises(mm.InputError, match="is one tower alone"):
        lens_report(model)
