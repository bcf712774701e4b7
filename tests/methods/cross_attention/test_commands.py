"""`mm-interp words` and `mm-interp trace`: files are written, and the numbers are those of the methods."""

from __future__ import annotations

import importlib
import json
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import mm_adapters as mm
from methods_multimodal.cross_attention import word_maps
from mm_adapters import cli

METHODS = EntryPoint("methods", "methods_multimodal.commands:register", cli.GROUP)
PROMPT = "a large red circle on a white background"


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.build((METHODS,)), list(arguments))


def test_words_writes_a_sheet_and_the_maps_behind_it(tmp_path: Path) -> None:
    out = tmp_path / "words.png"
    done = invoke("words", "--prompt", PROMPT, "--steps", "3", "--seed", "2", "--out", str(out))
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    with Image.open(out) as image:
        assert min(image.size) > 500
    numbers = json.loads(out.with_suffix(".json").read_text("utf-8"))
    model = mm.load("tiny-sd")
    inputs = {
        "prompt": PROMPT,
        "seed": 2,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "output_type": "pt",
    }
    maps, _ = word_maps(model, inputs)
    for word, told in numbers["words"].items():
        own = maps.heat(word)
        assert told["map"][3][5] == pytest.approx(float(own[3, 5]), abs=1e-4)
    assert list(numbers["words"]) == list(maps.words_of())


def test_trace_writes_effects_with_intervals_a_control_and_the_fast_estimate(tmp_path: Path) -> None:
    out = tmp_path / "trace.png"
    done = invoke(
        "trace",
        "--prompt",
        PROMPT,
        "--word",
        "red",
        "--other",
        "blue",
        "--seeds",
        "1",
        "--steps",
        "3",
        "--out",
        str(out),
    )
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    numbers = json.loads(out.with_suffix(".json").read_text("utf-8"))
    assert len(numbers["share"]) == len(numbers["parts"]) == len(numbers["attribution"]["effects"]) == 21
    assert all(a <= b <= c for a, b, c in zip(numbers["low"], numbers["share"], numbers["high"], strict=True))
    assert len(numbers["control"]["share"]) == 21
    assert numbers["everything"]["by construction"] is True
    assert numbers["everything"]["share"][0] == pytest.approx(1.0, abs=1e-4)
    assert "by construction" in done.output
    assert "turned in a random direction" in done.output
    with Image.open(out) as image:
        assert min(image.size) > 500


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("words", "--word", "dog"), "no 'dog'"),
        (("trace", "--word", "dog"), "no 'dog'"),
        (("words", "--model", "tiny-clip"), "draws nothing"),
        (("words", "--out", "words.txt"), "format is one of"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], told: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2, f"{done.output}\n{done.exception!r}"
    assert told in " ".join(done.stderr.split())


def test_trace_changes_the_first_of_a_word_that_is_there_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = importlib.import_module("methods_multimodal.commands.trace")
    asked: dict[str, Any] = {}
    model = SimpleNamespace(prompt_layout=lambda kind, prompts: SimpleNamespace(where=lambda word: [2]))
    monkeypatch.setattr(command, "open_model", lambda name, *a, **k: model)
    metrics, report = (
        importlib.import_module(f"methods_multimodal.{n}") for n in ("cross_attention.metrics", "report")
    )
    monkeypatch.setattr(metrics, "clip_contrast", lambda *a: asked.update(contrast=a[1:]))
    monkeypatch.setattr(report, "trace_report", lambda *a, **k: asked.update(k, positional=a[1:]))
    monkeypatch.setattr(command, "write_report", lambda made, out: asked.update(out=out))
    prompt, out = "a red circle and a red star", tmp_path / "t.png"
    options = [
        "--prompt",
        prompt,
        "--word",
        "red",
        "--other",
        "blue",
        "--seeds",
        "2",
        "--steps",
        "7",
        "--out",
        str(out),
    ]
    done = invoke("trace", *options)
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    assert asked["contrast"] == (prompt, "a blue circle and a red star")
    assert asked["positional"][:3] == (prompt, "red", "blue")
    assert (list(asked["seeds"]), asked["steps"], asked["out"]) == ([0, 1], 7, out)
