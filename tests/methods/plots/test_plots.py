"""Every plot shows what it showed when its picture was last looked at, down to a label's size.

After a change that is meant, draw them again (`python -m tests.methods.plots.drawings FOLDER`) and look.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
from importlib import import_module

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import methods_multimodal.plots
from methods_multimodal.plots import heatmap
from tests.methods.plots.drawings import DRAWINGS, SHOWN, figure_of
from tests.methods.plots.shown import differences, of_figure

WANTED = json.loads(SHOWN.read_text())


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_plot_shows_what_it_did(name: str) -> None:
    assert differences(json.loads(json.dumps(of_figure(figure_of(name)))), WANTED[name], name) == []


def test_every_plot_has_a_drawing_and_no_drawing_is_left_over() -> None:
    public = {
        name
        for module in pkgutil.iter_modules(methods_multimodal.plots.__path__)
        for name, of in vars(import_module(f"methods_multimodal.plots.{module.name}")).items()
        if inspect.isfunction(of) and not name.startswith("_") and of.__module__.endswith(module.name)
        if inspect.signature(of).return_annotation in ("Axes", "Figure", Axes, Figure)
    }
    assert {name for name in public if any(name in drawn for drawn in DRAWINGS)} == public - {"new_axes"}
    assert WANTED.keys() == DRAWINGS.keys()


def test_a_plot_draws_on_the_axes_it_is_given() -> None:
    left, right = Figure().subplots(1, 2)
    assert heatmap(torch.zeros(1, 1), right, unit="x") is right
    assert right.images
    assert not left.images


def test_the_comparison_sees_words_numbers_and_what_is_missing() -> None:
    wanted = {"a": [1.0, "x"], "b": {"c": None}}
    assert differences({"a": [1.0001, "x"], "b": {"c": None}}, wanted) == []
    assert differences({"a": [1.1, "y"], "b": {"c": None}}, wanted) == [
        ".a[0]: 1.1, not 1.0",
        ".a[1]: 'y', not 'x'",
    ]
    assert differences({"a": [1.0]}, wanted) == [".a: [1.0], not [1.0, 'x']", ".b: None, not {'c': None}"]
    assert differences({"d": 1, **wanted}, wanted) == [".d: 1, not None"]
    assert differences("red: +1.0004, no. 3", "red: +1.0, no. 3") == []
    for other in (
        "red: +1.1, no. 3",
        "red: -1.0, no. 3",
        "red: +1.0, no. 4",
        "blue: +1.0, no. 3",
        "red: +1.0",
    ):
        assert differences(other, "red: +1.0, no. 3") == [f": {other!r}, not 'red: +1.0, no. 3'"]
