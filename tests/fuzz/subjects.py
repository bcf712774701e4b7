"""What a call is made on: a model on one engine, its inputs, and the library's own model beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.probes import Change, Probe, watched

TEXTS = (
    "a red circle",
    "a blue square",
    "",
    "two green triangles",
    "what colour is it?",
    "A big, red cross!",
)
QUESTIONS = ("what colour is the circle?", "what shape is it?", "how many circles are there?", "where?")
PICTURES = ("red_circle", "blue_square")


@dataclass(frozen=True)
class Given:
    """Valid inputs: what the package is given, what the library's own model is given, and how many rows.

    `steps` is the number of sampling steps; `parts` how many parts of guidance a denoiser's rows have.
    """

    ours: dict[str, Any]
    plain: dict[str, Any]
    rows: int
    text: str
    steps: int | None = None
    parts: int = 1

    def rows_at(self, probe: Probe) -> int:
        return self.rows * (self.parts if probe.loop else 1)


@dataclass(frozen=True)
class Subject:
    """A model on one engine, and the library's own beside it."""

    name: str
    engine: str
    model: Any
    plain: Any
    probes: tuple[Probe, ...]
    draw: Callable[[Random], Given]
    head: Callable[[Any], Tensor]
    kind: str
    raw: bool = False
    generates: bool = False
    smooth: dict[str, Any] = field(default_factory=dict)

    @property
    def is_pipeline(self) -> bool:
        return self.kind == "diffusion"


def plain_run(
    subject: Subject,
    arguments: dict[str, Any],
    watch: Sequence[Probe] = (),
    change: Sequence[tuple[Probe, Change]] = (),
    follow: bool = False,
) -> tuple[Any, dict[str, list[Tensor]]]:
    """The output of the library's own model and the values at the probes, call by call.

    `follow` keeps the graph.
    """
    arguments = dict(arguments)
    if "seed" in arguments:
        arguments["generator"] = generator(arguments.pop("seed"))
    with torch.set_grad_enabled(follow), watched(subject.plain, watch, change) as seen:
        if subject.is_pipeline and follow:
            call: Any = type(subject.plain).__call__
            return call.__wrapped__(subject.plain, **arguments), seen
        return subject.plain(**arguments), seen


def generator(seed: Any) -> Any:
    if isinstance(seed, list):
        return [generator(one) for one in seed]
    return torch.Generator().manual_seed(seed)


def pictures(names: Sequence[str]) -> list[Any]:
    from PIL import Image

    from mm_adapters.zoo import sample_images

    files = sample_images()
    return [Image.open(files[name]).convert("RGB") for name in names]


def wrapped(engine: str, build: Callable[[], Any]) -> tuple[Any, Any, Any]:
    """A model of ours, the case that it was made of, and the library's own model beside it."""
    import tiny  # noqa: F401  # The others import it, and it them.

    import mm_adapters as mm

    case = build()
    model: Any = mm.wrap(case.model, engine=engine)
    return model, case, build().model
