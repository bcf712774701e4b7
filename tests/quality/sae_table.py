"""How many of the world's values a dictionary has a detector for, beside what is no dictionary at all.

python -m tests.quality.sae_table [--model tiny-clip] [--seeds 5] [--draws 3] [--images 22000] [--steps 2000]

Each row is made by one function: of the activations of a dictionary, the one and its threshold that detect
a value best are chosen on scenes of the split "validation"; counted is for how many values F1 is at least
0.9 on scenes of the split "test". Every row is over several seeds (of the SAE, of its random start, of
random directions) and draws of both sets of scenes; intervals are of their mean.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import BatchTopKTrainingSAEConfig, TrainingSAE
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import mm_adapters as mm
from integrations import sae_lens as mm_sae
from mm_adapters.zoo import world
from tests.quality.sae import CLIP_SITE, images_of, trainer, truth_of

Detectors = Callable[[Tensor], Tensor]
AT_LEAST = 0.9


@dataclass(frozen=True)
class Draw:
    """Rows [scene, width] of the site and what is true of each scene; the first half is to choose on."""

    rows: Tensor
    truth: Tensor
    names: list[str]

    def share(self, detectors: Detectors) -> float:
        """For which share of the values some detector has an F1 of at least 0.9."""
        first = torch.arange(len(self.rows)) < len(self.rows) // 2
        with torch.no_grad():
            acts = detectors(self.rows)
        return mm_sae.match_concepts(acts, self.truth, self.names, choose_on=first).share(AT_LEAST)

    def shuffled(self, seed: int) -> Draw:
        """The same with each scene's truth given to another."""
        order = torch.randperm(len(self.truth), generator=torch.Generator().manual_seed(seed))
        return Draw(self.rows, self.truth[order], self.names)


@dataclass(frozen=True)
class Row:
    """Shares [seed, draw], or [1, draw] where there is nothing to seed."""

    name: str
    shares: np.ndarray

    def mean(self) -> float:
        """Over seeds and draws."""
        return float(self.shares.mean())

    def half_width(self) -> float:
        """Of the 95 % interval of the mean: the errors of the seeds' and of the draws' means together."""
        errors = [
            means.var(ddof=1) / len(means)
            for means in (self.shares.mean(1), self.shares.mean(0))
            if len(means) > 1
        ]
        return 1.96 * float(np.sqrt(sum(errors)))

    def line(self) -> str:
        """As a row of the table."""
        seeds, draws = self.shares.shape
        inside = f"{self.shares.min():.0%} to {self.shares.max():.0%}"
        return f"| {self.name} | {self.mean():.0%} ± {self.half_width():.0%} | {inside} | {seeds} x {draws} |"


def config(k: int = 7, width: int = 128) -> BatchTopKTrainingSAEConfig:
    """Nothing revives dead latents: those that live are then few, and each one a value, not a pair."""
    return BatchTopKTrainingSAEConfig(
        d_in=width,
        d_sae=8 * width,
        k=k,
        normalize_activations="expected_average_only_in",
        aux_loss_coefficient=0.0,
    )


def training_scenes(n: int, small: float = 0.15) -> list[world.Scene]:
    """Scenes of one object, `small` of them with a small one."""
    return [
        world.scene(i, "train", seed=5, kind="one", size=None if i % 100 < 200 * small else "large")
        for i in range(n)
    ]


def rows_of(model: mm.HookedModel, scenes: list[world.Scene], folder: Path) -> Tensor:
    """The class token at the site, [scene, width]."""
    made = mm_sae.collect(
        model, CLIP_SITE, images_of(scenes), folder, tokens="class", batch_size=100, progress=False
    )
    return made.rows()[CLIP_SITE]


def draw(model: mm.HookedModel, number: int, n: int, folder: Path) -> Draw:
    """As many scenes of "validation" and of "test", those of this draw."""
    scenes = [
        world.scene(i, split, seed=100 + number, kind="one")
        for split in ("validation", "test")
        for i in range(n)
    ]
    return Draw(rows_of(model, scenes, folder / f"draw-{number}"), *truth_of(scenes))


def trained(model: mm.HookedModel, seed: int, steps: int, n_images: int, folder: Path) -> Any:
    """An SAE of the site."""
    store = mm_sae.collect(
        model, CLIP_SITE, images_of(training_scenes(n_images)), folder / "train",
        tokens="class", batch_size=100, progress=False,
    )  # fmt: skip
    return mm_sae.train(
        model, CLIP_SITE, config(), data=store, trainer=trainer(steps, 512), centre=True, seed=seed,
        folder=folder / f"sae-{steps}-{seed}", progress=False,
    )  # fmt: skip


def untrained_twin(model: mm.HookedModel, seed: int) -> mm.HookedModel:
    """The same architecture with the weights it would start from."""
    torch.manual_seed(seed)
    made = type(model.wrapped)(copy.deepcopy(model.wrapped.config)).eval()
    return mm.HookedModel(made, inputs=model.inputs)


def start_of(seed: int, like: Any) -> Detectors:
    """An SAE before its first step, on rows centred and scaled as the trained one's are."""
    torch.manual_seed(seed)
    sae = TrainingSAE.from_dict(config(width=like.cfg.d_in).to_dict())
    return lambda rows: sae.encode(rows)


def directions(seed: int, centre: Tensor) -> Detectors:
    """Projections on random directions, as many as the SAE has latents."""
    made = torch.randn(8 * centre.shape[-1], centre.shape[-1], generator=torch.Generator().manual_seed(seed))
    return lambda rows: ((rows - centre) @ made.T).relu()


def neurons(centre: Tensor) -> Detectors:
    """Each coordinate of the rows, and its negative."""
    return lambda rows: torch.cat([rows - centre, centre - rows], -1).relu()


def principal_components(rows: Tensor) -> Detectors:
    """Each principal component of the training rows, and its negative."""
    centre = rows.mean(0)
    _, _, axes = torch.linalg.svd(rows - centre, full_matrices=False)
    return lambda given: torch.cat([(given - centre) @ axes.T, (centre - given) @ axes.T], -1).relu()


def rows_as_dictionary(seed: int, rows: Tensor) -> Detectors:
    """Projections on training rows themselves, as many as the SAE has latents."""
    centre = rows.mean(0)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: 8 * rows.shape[-1]]
    made = torch.nn.functional.normalize(rows[chosen] - centre, dim=-1)
    return lambda given: ((given - centre) @ made.T).relu()


def probe(rows: Tensor, truth: Tensor) -> Detectors:
    """A logistic regression for each value, trained on labelled rows: what the site holds linearly."""
    centre, scale = rows.mean(0), rows.std(0)
    given = ((rows - centre) / scale).numpy()
    fits = [LogisticRegression(C=1.0, max_iter=500).fit(given, labels.numpy()) for labels in truth.T]
    weight = torch.tensor(np.stack([fit.coef_[0] for fit in fits]), dtype=rows.dtype)
    offset = torch.tensor([float(fit.intercept_[0]) for fit in fits], dtype=rows.dtype)
    return lambda some: (((some - centre) / scale) @ weight.T + offset).sigmoid()


def table(
    model: mm.HookedModel, folder: Path, *, seeds: int, draws: int, n: int, n_images: int, steps: int
) -> Iterator[Row]:
    """The rows, one after the other.

    Args:
        model: With an image tower that has the site.
        folder: Keeps activations and SAEs.
        seeds: Of SAEs, random starts and random directions.
        draws: Of scenes.
        n: Scenes of each split and draw.
        n_images: Scenes that SAEs are trained on.
        steps: Of a training.
    """
    data = [draw(model, number, n, folder) for number in range(draws)]
    scenes = training_scenes(n_images)
    rows = rows_of(model, scenes, folder / "train")
    centre = rows.mean(0)

    def row(name: str, makes: list[Detectors], judged: list[Draw] = data) -> Row:
        return Row(name, np.array([[one.share(detectors) for one in judged] for detectors in makes]))

    saes = [trained(model, seed, steps, n_images, folder) for seed in range(seeds)]
    yield row("SAE", [sae.encode for sae in saes])
    shuffled = [one.shuffled(number) for number, one in enumerate(data)]
    yield row("SAE, labels shuffled", [sae.encode for sae in saes], shuffled)
    yield row("SAE before training", [start_of(seed, saes[0]) for seed in range(seeds)])
    yield row("random directions", [directions(seed, centre) for seed in range(seeds)])
    yield row("neurons", [neurons(centre)])
    yield row("principal components", [principal_components(rows)])
    yield row("training rows as dictionary", [rows_as_dictionary(seed, rows) for seed in range(seeds)])
    twin = untrained_twin(model, 0)
    twins = [draw(twin, number, n, folder / "twin") for number in range(draws)]
    of_twin = [trained(twin, seed, steps, n_images, folder / "twin") for seed in range(min(2, seeds))]
    yield row("SAE of random weights", [sae.encode for sae in of_twin], twins)
    yield row("linear probe (told the labels)", [probe(rows[:6000], truth_of(scenes[:6000])[0])])


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-clip")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=2000, help="of each split and draw")
    parser.add_argument("--images", type=int, default=22_000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="keeps activations and SAEs, to go on with")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = mm.load(options.model)
    print("| detectors | values with F1 >= 0.9 | worst to best | seeds x draws |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        for row in table(
            model,
            options.folder or Path(made),
            seeds=options.seeds,
            draws=options.draws,
            n=options.scenes,
            n_images=options.images,
            steps=options.steps,
        ):
            print(row.line(), flush=True)


if __name__ == "__main__":
    main()
