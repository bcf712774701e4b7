"""`mm-interp heads` as users run it: a page that stands alone, numbers, resuming, one-line mistakes."""

from __future__ import annotations

import importlib
import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from methods_multimodal.text_explanations.vocabulary import vocabulary
from mm_adapters import cli
from mm_adapters.zoo import world
from mm_adapters.zoo.measures import images_of

METHODS = EntryPoint("methods", "methods_multimodal.commands:register", cli.GROUP)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.build((METHODS,)), ["heads", *arguments])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    scenes = [world.scene(i, "validation", kind="one") for i in range(60)]
    for i, image in enumerate(images_of(scenes)):
        image.save(folder / ("more" if i % 2 else ".") / f"{i:03d}.png")
    return folder


def test_it_writes_a_page_that_stands_alone_and_the_numbers_behind_it(images: Path, tmp_path: Path) -> None:
    options = ["--images", str(images), "--vocabulary", "world", "--texts", "2", "--top", "3"]
    result = invoke(*options, "--out", str(tmp_path / "a"))
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    page = (tmp_path / "a" / "heads.html").read_text()
    numbers = json.loads((tmp_path / "a" / "heads.json").read_text())
    assert numbers["images"] == 60
    assert len(numbers["heads"]) == 16
    first = next(h for h in numbers["heads"] if (h["layer"], h["head"]) == (1, 0))["texts"][0]
    assert first["group"] == "colour"
    assert len(first["images"]) == 3
    assert first["text"] in page
    # Nothing is loaded from anywhere: every source is data, and there is no script and no link.
    sources = re.findall(r'url\("?([^")]*)', page)
    assert page.count('role="img"') == 16 * 2 * 3
    assert 3 <= len(sources) <= 60
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    assert set(re.findall(r'class="thumb (of\d+)"', page)) == set(re.findall(r"\.(of\d+) {", page))
    assert not re.search(r"<script|<img|src=|href=", page)
    again = invoke(*options, "--out", str(tmp_path / "a"))  # Its work is written down: it has little to do.
    assert again.exit_code == 0
    assert json.loads((tmp_path / "a" / "heads.json").read_text()) == numbers


def test_mistakes_are_one_line_before_anything_is_loaded(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = importlib.import_module("methods_multimodal.commands.heads")
    monkeypatch.setattr(command, "open_model", lambda *a, **k: pytest.fail("it loaded"))
    empty = tmp_path / "empty"
    empty.mkdir()
    for wrong, said in (
        (("--images", "nowhere"), "no such folder"),
        (("--images", str(empty)), "holds no image"),
        (("--images", str(images), "--vocabulary", "nothing.txt"), "no vocabulary nothing.txt"),
        (("--images", str(images), "--vocabulary", "world", "--texts", "99"), "the vocabulary has"),
    ):
        result = invoke(*wrong, "--out", str(tmp_path / "x"))
        assert result.exit_code == 2
        assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "x").exists()
    n = len(vocabulary("world"))
    options = ["--images", str(images), "--vocabulary", "world", "--out", str(tmp_path / "y"), "--texts"]
    assert f"the vocabulary has {n}" in " ".join(invoke(*options, str(n + 1)).stderr.split())
    with pytest.raises(pytest.fail.Exception, match="it loaded"):
        invoke(*options, str(n))


def test_a_broken_image_is_named_and_skipped_if_asked(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for file in sorted(images.glob("*.png"))[:12]:
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "broken.png").write_bytes(b"not a picture")
    options = [
        "--images",
        str(folder),
        "--vocabulary",
        "world",
        "--texts",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    result = invoke(*options)
    assert result.exit_code == 2
    assert "broken.png" in result.stderr
    result = invoke(*options, "--skip-unreadable")
    assert result.exit_code == 0, result.output
    assert "skipped" in result.stdout
    numbers = json.loads((tmp_path / "out" / "heads.json").read_text())
    assert [Path(u["image"]).name for u in numbers["unreadable"]] == ["broken.png"]
    assert "broken.png" in (tmp_path / "out" / "heads.html").read_text()
