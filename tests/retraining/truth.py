"""What retraining found, as it is shipped, and the full models it was found with."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor

from tests.retraining import model as small
from tests.retraining.pictures import Pictures, planted_pictures, training_pictures
from tests.retraining.subsets import SEEDS, all_queries

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Truth:
    """Losses of queries under models trained on parts of the training set.

    Queries are held-out pictures, then as many that the full model drew. `again` are the first subsets with
    another seed; `full` [seed, query]. `planted` [with and without the sources, query]. `without` says by
    how much each method's top examples, `removed`, are missed: [query of LEFT_OUT_QUERIES, seed].
    """

    subsets: Bool[Tensor, "subset picture"]
    losses: Float[Tensor, "subset query"]
    training_losses: Float[Tensor, "subset picture"]
    again: Float[Tensor, "repeat query"]
    full: Float[Tensor, "seed query"]
    full_training: Float[Tensor, "seed picture"]
    planted: Float[Tensor, "with query"]
    drawn: Tensor
    planted_drawn: Tensor
    removed: dict[str, Int[Tensor, "row picture"]]
    without: dict[str, Float[Tensor, "query seed"]]
    folder: Path

    @classmethod
    def read(cls, folder: Path = FOLDER) -> Truth:
        """The shipped file, or one just made."""
        # Before anything was left out, there is nothing of it.
        none: dict[str, Any] = {"removed": {}, "without": {}}
        return cls(**none | unpacked(folder / "truth.safetensors"), folder=folder)

    def model(self, planted: bool = False) -> small.Denoiser:
        """The model trained on everything, of the first seed."""
        return small.model_of(self.checkpoints(planted)[0])

    def checkpoints(self, planted: bool = False) -> list[dict[str, Tensor]]:
        """The weights of all models trained on everything, one a seed."""
        state = load_file(self.folder / "model.safetensors")
        prefixes = ["planted/"] if planted else [f"full-{seed}/" for seed in SEEDS]
        return [{n.removeprefix(p): v.float() for n, v in state.items() if n.startswith(p)} for p in prefixes]

    def training(self, planted: bool = False) -> Pictures:
        """What it was trained on."""
        return planted_pictures() if planted else training_pictures()

    def queries(self, planted: bool = False) -> Pictures:
        """What it is asked about."""
        return all_queries(self.planted_drawn if planted else self.drawn, planted)


def unpacked(path: Path) -> dict[str, Any]:
    """The tensors of a file, those with a name like "removed/CLIP" in a dict of their own."""
    found: dict[str, Any] = {}
    for name, value in load_file(path).items():
        outer, _, inner = name.partition("/")
        if inner:
            found.setdefault(outer, {})[inner] = value
        else:
            found[name] = value
    return found


def about() -> dict[str, str]:
    """What the numbers were made with, for the file's header."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "numpy")}
    settings = {"steps": small.STEPS, "batch": small.BATCH, "rate": small.RATE, "timesteps": small.TIMESTEPS}
    return {"versions": json.dumps(versions), "settings": json.dumps(settings | {"noises": small.NOISES})}
