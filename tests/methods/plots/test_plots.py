"""Every plot shows what it showed when its picture was last looked at, down to a label's size.

After a change that is meant, draw them again (`python -m tests.methods.plots.drawings FOLDER`) and look.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
from importlib import import_module
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import methods_multimodal.plots
from methods_multimodal.plots import heatmap
from tests.methods.plots.drawings import DRAWINGS, SHOWN, figure_of
from tests.methods.plots.shown import of_figure

WANTED = json.loads(SHOWN.read_text())


def differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """Where two descriptions differ: words at all, numbers by more than a thousandth."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [*wanted, *(k for k in found if k not in wanted)]
        return [d for k in keys for d in differences(found.get(k), wanted.get(k), f"{where}.{k}")]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}[{i}]")]
    both = isinstance(found, int | float) and isinstance(wanted, int | float)
    same = found == pytest.approx(wanted, rel=1e-3, abs=1e-4) if both else found == wanted
    return [] if same else [f"{where}: {found!r}, not {wanted!r}"]


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
