"""`mm-interp attribute`: the numbers are the methods' own, work is not done twice, mistakes are one line."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mm_adapters as mm
from methods_multimodal.data_attribution import (
    Projection,
    Trak,
    diffusion_examples,
    diffusion_task,
    featurise,
    query_features,
    scores,
)
from methods_multimodal.data_attribution.pictures import read_pictures
from mm_adapters import cli
from mm_adapters.zoo.sd import N_TRAINING

METHODS = EntryPoint("methods", "methods_multimodal.commands:register", cli.GROUP)
SMALL = ("--train", "zoo:6", "--timesteps", "2", "--width", "64", "--steps", "3", "--query", "a red circle")


def invoke(at: Path, *arguments: str) -> Any:
    given = ("attribute", *SMALL, "--work", str(at / "work"), "--out", str(at / "a.png"), *arguments)
    return CliRunner().invoke(cli.build((METHODS,)), list(given))


def found(at: Path, *arguments: str) -> dict[str, Any]:
    result = invoke(at, *arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    with Image.open(at / "a.png") as image:
        assert min(image.size) > 400
    return json.loads((at / "a.json").read_text())


def refused(at: Path, *arguments: str) -> str:
    result = invoke(at, *arguments)
    assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
    return " ".join(result.stderr.split())


def test_its_scores_are_those_of_the_library_and_features_are_made_once(tmp_path: Path) -> None:
    told = found(tmp_path)
    model = mm.load("tiny-sd")
    pipe: Any = model.wrapped
    drawn = pipe("a red circle", num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images[0]
    known = read_pictures("zoo:6")
    examples = diffusion_examples(model, known.images(), list(known.captions))
    asked = diffusion_examples(model, [drawn], ["a red circle"])
    task, width = (
        diffusion_task(model, measure="output_norm", timesteps=2, noise="one"),
        Projection("sparse", 64),
    )
    store = featurise(task, examples, tmp_path / "own", projection=width)
    own = scores(Trak("output_norm"), store, query_features(task, asked, projection=width))[0]
    order = [row["number"] for row in told["scores"]]
    assert order == own.argsort(descending=True).tolist()
    torch.testing.assert_close(torch.tensor([row["score"] for row in told["scores"]]), own[order])

    made = sorted((tmp_path / "work").rglob("*.safetensors"))
    stamps = [path.stat().st_mtime_ns for path in made]
    assert found(tmp_path, "--seed", "1")["seed"] == 1
    assert [path.stat().st_mtime_ns for path in made] == stamps
    assert made


@pytest.mark.parametrize(
    "method", ["trak", "journey-trak", "cosine", "datainf", "unlearning", "clip", "pixels", "ekfac"]
)
def test_every_method_ranks_all_training_pictures(tmp_path: Path, method: str) -> None:
    told = found(tmp_path, "--method", method, "--parameters", "cross_attention_kv")
    values = [row["score"] for row in told["scores"]]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 6
    assert sorted(row["number"] for row in told["scores"]) == list(range(6))


def test_a_training_picture_that_is_asked_about_is_its_own_nearest(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    known = read_pictures("zoo:4")
    for i, caption in enumerate(known.captions):
        known.image(i).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(caption)
    for method in ("pixels", "clip"):
        told = found(
            tmp_path, "--train", str(pictures), "--image", str(pictures / "2.png"), "--method", method
        )
        assert told["scores"][0]["name"] == "2.png"
        assert told["scores"][0]["score"] == pytest.approx(1.0, abs=1e-4)


def test_mistakes_are_found_before_anything_is_loaded(tmp_path: Path) -> None:
    assert "there is d-trak, trak" in refused(tmp_path, "--method", "magic")
    assert str(N_TRAINING) in refused(tmp_path, "--train", "zoo:0")
    assert "There is no folder" in refused(tmp_path, "--train", str(tmp_path / "none"))
    assert "There is no image" in refused(tmp_path, "--image", str(tmp_path / "none.png"))
    here = Path(__file__)
    assert "takes no --image" in refused(tmp_path, "--image", str(here), "--method", "journey-trak")
    assert "format is one of" in refused(tmp_path, "--out", str(tmp_path / "a.txt"))
    assert "does not draw" in refused(tmp_path, "--model", "tiny-clip")
