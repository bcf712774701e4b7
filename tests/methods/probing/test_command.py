"""`mm-interp probe` as users run it: their table, a picture, numbers, a record, one-line mistakes."""

from __future__ import annotations

import csv
import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mm_adapters as mm
from methods_multimodal.commands.probe import inputs_of
from methods_multimodal.probing import ProbeSheet, probe
from mm_adapters import cli
from mm_adapters.zoo import measures, world

METHODS = EntryPoint("methods", "methods_multimodal.commands:register", cli.GROUP)
SITE = "vision.blocks.2.hook_resid_post"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.build((METHODS,)), ["probe", *arguments])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    scenes = [world.scene(i, "validation", kind="one") for i in range(45)]
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "size", "ground", "type"])
        for i, (scene, picture) in enumerate(zip(scenes, measures.images_of(scenes), strict=True)):
            picture.save(folder / f"{i}.png")
            thing = scene.things[0]
            writer.writerow([f"{i}.png", thing.size, scene.background, thing.colour])
    return folder / "table.csv"


def test_a_table_becomes_a_picture_with_numbers_and_a_record(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "probe.png"
    done = run("--table", str(table), "--sites", SITE, "--role", "class", "--out", str(out))
    assert done.exit_code == 0, done.output
    sheet = ProbeSheet.load(out.with_suffix(".safetensors"))
    assert sheet.variables == ("size", "ground")
    assert sheet.kinds == ("task", "shuffled", "control", "twin")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    own = probe(
        mm.load("tiny-clip"),
        [{"images": [table.parent / row["image"] for row in rows]}],
        {name: [row[name] for row in rows] for name in ("size", "ground")},
        sites=SITE,
        roles=("class",),
        types=[row["type"] for row in rows],
    )
    # In batches of another size values differ in the last bit.
    assert float((own.right != sheet.right).double().mean()) < 0.05
    numbers = json.loads(out.with_suffix(".json").read_text())
    place = numbers["places"][0]
    low, high = sheet.interval()[:, 0, 0, 0, 0].tolist()
    assert place["accuracy, low, high"]["task"] == [float(sheet.accuracy()[0, 0, 0, 0]), low, high]
    line = f"size, class: {float(sheet.accuracy()[0, 0, 0, 0]):.0%}"
    assert line in done.output
    with Image.open(out) as image:
        assert image.size[0] > 300


def test_a_sampling_loop_is_probed_by_step(tmp_path: Path) -> None:
    out = tmp_path / "steps.png"
    arguments = ("--model", "tiny-sd", "--sites", "denoiser.blocks.3.hook_resid_post", "--scenes", "60")
    done = run(*arguments, "--steps", "2", "--step", "1", "--step", "0", "--out", str(out))
    assert done.exit_code == 0, done.output
    sheet = ProbeSheet.load(out.with_suffix(".safetensors"))
    assert sheet.steps == (0, 1)
    assert bool(torch.isfinite(sheet.accuracy()).all())


def test_each_tower_is_given_what_it_reads() -> None:
    rows = [{"image": Path("a.png"), "text": "a", "prompt": "p", "size": "small"}] * 3
    clip, llava, sd = (mm.load(name) for name in ("tiny-clip", "tiny-llava", "tiny-sd"))
    assert [list(b) for b in inputs_of(clip, "vision", rows, 2, 1)] == [["images"], ["images"]]
    assert inputs_of(clip, "text", rows, 2, 1)[1] == {"text": ["a"]}
    assert set(inputs_of(llava, "language", rows, 3, 1)[0]) == {"images", "text"}
    assert inputs_of(sd, "text", rows, 2, 4)[1]["seed"] == [2]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("size,weight\nsmall,1\n", "text or prompt says what is run"),
        ("text\na\n", "is a variable"),
        ("text,size\na,\n", "row 1 has not one value for each column"),
        ("image,size\nnone.png,small\n", "there is no file"),
        ("text,size\na,small\n", "reads a column image, and the table has none"),
        ("", "of no row"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(lines: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(lines)
    done = run("--table", str(tmp_path / "table.csv"), "--out", str(tmp_path / "probe.png"))
    assert done.exit_code == 2

    assert said in done.output.strip().splitlines()[-1]
    assert "Traceback" not in done.output
