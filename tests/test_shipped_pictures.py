"""No picture is of weights that have changed since, and what the quick commands draw is what is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import shipped_pictures
from tests.methods.plots.shown import differences

STORED = json.loads(shipped_pictures.SHOWN.read_text("utf-8"))
AGAIN = "python -m tests.shipped_pictures {}, and look at it."


def test_every_shipped_picture_has_its_command() -> None:
    files = {file.stem for file in shipped_pictures.FOLDER.glob("*.png")}
    assert files == set(shipped_pictures.COMMANDS) == set(STORED)


@pytest.mark.parametrize("model", ["tiny-clip", "tiny-llava", "tiny-sd"])
def test_pictures_are_of_the_weights_that_are_shipped(model: str) -> None:
    now = shipped_pictures.weights_of(model)
    for name in shipped_pictures.COMMANDS:
        if shipped_pictures.model_of(name) == model:
            assert STORED[name]["weights"] == now, AGAIN.format(name)


@pytest.mark.parametrize("name", shipped_pictures.QUICK)
def test_what_a_command_draws_is_what_is_shipped(name: str, tmp_path: Path) -> None:
    found = shipped_pictures.drawn(name, tmp_path / "drawn.png")
    assert differences(json.loads(json.dumps(found)), STORED[name]["shows"]) == [], AGAIN.format(name)
