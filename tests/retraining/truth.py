"""What retraining found, as it is shipped, and the full models it was found with."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path

from diffusers import UNet2DConditionModel
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor

from tests.retraining import model as small
from tests.retraining.pictures import Pictures, planted_pictures, training_pictures
from tests.retraining.subsets import all_queries

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
        tensors = load_file(folder / "truth.safetensors")
        nested: dict[str, dict[str, Tensor]] = {"removed": {}, "without": {}}
        for name in [n for n in tensors if "/" in n]:
            outer, _, inner = name.partition("/")
            nested[outer][inner] = tensors.pop(name)
        return cls(**tensors, **nested, folder=folder)

    def model(self, planted: bool = False) -> UNet2DConditionModel:
        """The model trained on everything."""
        prefix = "planted/" if planted else "full-0/"
        state = load_file(self.folder / "model.safetensors")
        found = small.build()
        found.load_state_dict(
            {n.removeprefix(prefix): v.float() for n, v in state.items() if n.startswith(prefix)}
        )
        return found.eval().requires_grad_(False)

    def training(self, planted: bool = False) -> Pictures:
        """What it was trained on."""
        return planted_pictures() if planted else training_pictures()

    def queries(self, planted: bool = False) -> Pictures:
        """What it is asked about."""
        return all_queries(self.planted_drawn if planted else self.drawn, planted)


def about() -> dict[str, str]:
    """What the numbers were made with, for the file's header."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "numpy")}
    settings = {"steps": small.STEPS, "batch": small.BATCH, "rate": small.RATE, "timesteps": small.TIMESTEPS}
    return {"versions": json.dumps(versions), "settings": json.dumps(settings | {"noises": small.NOISES})}
