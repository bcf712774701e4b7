"""Each example runs as it is, writes the file it names, and shows what it says it shows."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("[0-9]*.py"))


def run(name: str, out: Path, *arguments: str) -> Any:
    return runpy.run_path(str(FOLDER / name))["main"]([*arguments, "--out", str(out)])


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_writes_one_file_and_prints_its_path(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "hooks.txt" in (FOLDER / name).read_text()
    out = tmp_path / ("out.txt" if text else "out.png")
    options = ["--steps", "6"] if "--steps" in (FOLDER / name).read_text() else []
    assert run(name, out, *options) == out
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    if text:
        assert "hook_pattern" in out.read_text()
    else:
        with Image.open(out) as image:
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_examples_are_numbered_and_ask_one_question_each() -> None:
    assert [name[:2] for name in EXAMPLES] == [f"{i + 1:02d}" for i in range(len(EXAMPLES))]
    for name in EXAMPLES:
        assert (FOLDER / name).read_text().splitlines()[0].count("?") == 1, name
