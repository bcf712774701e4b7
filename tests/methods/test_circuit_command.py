"""`mm-interp circuit` as users run it: a page with its numbers, MIB's JSON, one-line mistakes."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mm_adapters import cli
from mm_adapters.zoo import measures, world

METHODS = EntryPoint("methods", "methods_multimodal.commands:register", cli.GROUP)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.build((METHODS,)), ["circuit", *arguments])


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    scenes = [world.by_hand("white", world.thing("ring", colour)) for colour in ("red", "blue")]
    for name, image in zip(("a", "b"), measures.images_of(scenes), strict=True):
        image.save(tmp_path / f"{name}.png")
    return ["--image", str(tmp_path / "a.png"), "--twin", str(tmp_path / "b.png")]


def test_it_writes_a_page_its_numbers_and_the_edges(pair: list[str], tmp_path: Path) -> None:
    texts = ["--answer", "a red ring", "--other", "a blue ring"]
    more = ["--edges", "--mib", str(tmp_path / "edges.json"), "--out", str(tmp_path / "c.png")]
    result = invoke("--model", "tiny-clip", *pair, *texts, *more)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    numbers = json.loads((tmp_path / "c.json").read_text())
    assert len(numbers["nodes"]) == 42
    assert numbers["judged on"] == "the pairs it was chosen on"
    assert numbers["faithfulness"] >= 0.9
    assert abs(numbers["completeness"] - 1) < 0.1
    assert numbers["circuit"][0] == "v.input"
    assert not [name for name in numbers["circuit"][:3] if name.startswith("t.")]
    assert "v.m0->v.a1.h3<q>" in json.loads((tmp_path / "edges.json").read_text())["edges"]
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_without_arguments_it_is_of_a_sample_picture_and_its_twin(tmp_path: Path) -> None:
    result = invoke("--out", str(tmp_path / "c.png"))
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    numbers = json.loads((tmp_path / "c.json").read_text())
    assert len(numbers["nodes"]) == 43
    assert numbers["faithfulness"] >= 0.9


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model", "tiny-clip", "--answer", "x"], "0 --other: give one"),
        (["--model", "tiny-clip", "--answer", "x", "--other", "y", "--other", "z"], "2 --other: give one"),
        (["--model", "tiny-llava", "--answer", "red", "--other", "blue"], "--question"),
        (["--answer", "red", "--other", "red", "--question", "what colour is the ring?"], "same token"),
    ],
)
def test_mistakes_are_one_line(pair: list[str], more: list[str], said: str, tmp_path: Path) -> None:
    result = invoke(*pair, *more, "--out", str(tmp_path / "c.png"))
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
