"""The zoo's recipes give what they gave: scenes, words and questions exactly, losses but for rounding."""

from __future__ import annotations

import json

import pytest

from tests.methods.plots.shown import differences
from tests.zoo.recipe import RECIPES, SHOWN, made

WANTED = json.loads(SHOWN.read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_what_it_gave(name: str) -> None:
    assert differences(made(name), WANTED[name], name, rel=5e-3, abs=2e-4) == []


def test_no_recipe_is_left_over() -> None:
    assert WANTED.keys() == RECIPES.keys()
