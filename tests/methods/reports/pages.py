"""Each report of the zoo's models, small: `python -m tests.methods.reports.pages FOLDER` draws all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.report import (
    contrastive_report,
    diffusion_report,
    flow_report,
    trace_report,
    vlm_report,
    words_report,
)
from methods_multimodal.report._page import Report
from mm_adapters.zoo import sample_images
from tests.methods.plots.shown import described, of_figure

SHOWN = Path(__file__).with_name("shown.json")
PAGES: dict[str, Callable[[], Report]] = {}


@cache
def model(name: str) -> mm.Model:
    return mm.load(name)


def page(make: Callable[[], Report]) -> Callable[[], Report]:
    PAGES[make.__name__] = make
    return make


def redness(pictures: Tensor) -> Tensor:
    return (pictures[:, 0] - pictures[:, 2]).mean((-1, -2))


@page
def contrastive() -> Report:
    images = [sample_images()[name] for name in ("red_circle", "blue_square")]
    return contrastive_report(model("tiny-clip"), images, ("a red circle", "a blue square"))


@page
def contrastive_of_one_text() -> Report:
    images = [sample_images()[name] for name in ("green_triangle", "yellow_star")]
    texts = ("a green triangle at the top left of the picture",)
    return contrastive_report(model("tiny-clip"), images, texts, ("mine", "other"), model_name="a name")


@page
def vlm() -> Report:
    pair = ("red_circle_left_of_blue_square", "blue_circle_left_of_red_square")
    images = [sample_images()[name] for name in pair]
    return vlm_report(model("tiny-llava"), images, "what colour is the circle?")


@page
def vlm_of_one_answer() -> Report:
    images = [sample_images()[name] for name in ("red_circle", "three_red_squares")]
    return vlm_report(model("tiny-llava"), images, "what colour is it?", ("a", "b"), model_name="a name")


@page
def diffusion() -> Report:
    return diffusion_report(model("tiny-sd"), "a red circle", steps=3, guidance_scale=2.0)


@page
def diffusion_of_many_words() -> Report:
    prompt = "a small red circle left of a large blue square on white"
    return diffusion_report(model("tiny-sd"), prompt, seed=3, steps=2, model_name="a name")


@page
def words() -> Report:
    return words_report(model("tiny-sd"), "a red circle", steps=3)


@page
def words_of_some() -> Report:
    prompt = "a small red circle left of a large blue square on white"
    chosen = ("red", "circle", "square", "blue")
    options: dict[str, Any] = {"words": chosen, "seed": 2, "threshold": None, "model_name": "a name"}
    return words_report(model("tiny-sd"), prompt, steps=2, **options)


@page
def words_and_what_they_change() -> Report:
    return words_report(model("tiny-sd"), "a red circle in the middle", steps=3, changed=True)


@page
def trace() -> Report:
    return trace_report(
        model("tiny-sd"), "a red circle", "red", "blue", redness, seeds=(0, 1), steps=4, n_groups=2
    )


@page
def flow() -> Report:
    pair = ("red_circle_left_of_blue_square", "blue_circle_left_of_red_square")
    images = [sample_images()[name] for name in pair]
    return flow_report(model("tiny-llava"), images, "what colour is the circle?", window=2)


def shown(report: Report) -> dict[str, Any]:
    """The page, its numbers and its lines."""
    found = {"page": of_figure(report.figure), "numbers": report.numbers, "lines": list(report.lines)}
    return json.loads(json.dumps(described(found)))


def main(folder: Path) -> None:
    """Draws all into a folder, and writes what they show."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, make in PAGES.items():
        report = make()
        lines.append(f"{json.dumps(name)}: {json.dumps(shown(report))}")
        report.write(folder / f"{name}.png")
    SHOWN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
