"""Every scorer on the small model: what is compared with what retraining found.

    python -m tests.retraining.scores [--write] [--picture FILE]

prints the table of linear datamodeling scores, and with --write writes it into
docs/methods/gradient_attribution.md. Minutes on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.data_attribution.counterfactual import top
from methods_multimodal.data_attribution.diffusion import denoiser_task
from methods_multimodal.data_attribution.evaluation import Chosen, choose_damping
from methods_multimodal.data_attribution.features import Features, featurise, query_features
from methods_multimodal.data_attribution.kronecker import kronecker_scores
from methods_multimodal.data_attribution.projection import Projection
from methods_multimodal.data_attribution.retrieval import pixel_features, similarity
from methods_multimodal.data_attribution.scorers import Cosine, DataInf, Dot, scores
from methods_multimodal.data_attribution.task import Task
from methods_multimodal.data_attribution.trak import Trak
from methods_multimodal.data_attribution.unlearning import fisher_diagonal, unlearning_scores
from methods_multimodal.plots.data_attribution import score_bars
from mm_adapters.store import Store
from tests.retraining.clip_features import cosines
from tests.retraining.model import model_of, scheduler
from tests.retraining.pictures import N_TRAIN, Pictures
from tests.retraining.subsets import LEFT_OUT_QUERIES, LEFT_OUT_SHARE, SEEDS
from tests.retraining.truth import Truth

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "gradient_attribution.md"
BEGIN, END = "<!-- lds: python -m tests.retraining.scores --write -->", "<!-- /lds -->"
TIMESTEPS = 20
PROJECTION = Projection("sparse", 2048)
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
NONE = (0.0,)


@dataclass(frozen=True)
class Method:
    """A scorer, by what its damping may be; `NONE` if it has none."""

    make: Callable[[float], Tensor]
    dampings: tuple[float, ...] = NONE


class Subject:
    """The small model with its gradient features, those of every seed's model side by side."""

    def __init__(
        self,
        checkpoints: Sequence[dict[str, Tensor]],
        training: Pictures,
        queries: Pictures,
        folder: Path,
        study: str = "truth",
    ) -> None:
        self.model, self.folder, self.study = model_of(checkpoints[0]), folder, study
        self.training, self.queries = training, queries
        task = self.task(TIMESTEPS, ("loss", "output_norm"))
        asked: dict[str, Any] = {
            "projection": PROJECTION, "checkpoints": list(checkpoints), "batch_size": 16,
            "max_rows": 16 * TIMESTEPS,
        }  # fmt: skip
        self.store: Store = featurise(task, self.training.examples(), folder / "store", **asked)
        self.features: Features = query_features(task, self.queries.examples(), **asked)

    @classmethod
    def of(cls, truth: Truth, folder: Path, planted: bool = False) -> Subject:
        """That of a shipped training set."""
        study = "planted" if planted else "truth"
        return cls(truth.checkpoints(planted), truth.training(planted), truth.queries(planted), folder, study)

    def task(
        self, timesteps: int, measures: Sequence[str] = ("loss",), parameters: str | Sequence[str] = "all"
    ) -> Task:
        """The denoiser's measures, all pictures under the same noise."""
        return denoiser_task(
            self.model,
            scheduler(),
            measure=measures,
            timesteps=timesteps,
            noise="one",
            parameters=parameters,
        )

    def methods(self) -> dict[str, Method]:
        """All of them, by the name the table has."""
        found = {
            "raw pixels": Method(lambda _: self.pixels()),
            "CLIP features": Method(lambda _: self.clip()),
            "gradient dot": Method(lambda _: self._scored(Dot())),
            "gradient cosine": Method(lambda _: self._scored(Cosine())),
            "DataInf": Method(lambda d: self._scored(DataInf(d)), DAMPINGS),
        }
        for name, measure in (("TRAK", "loss"), ("D-TRAK", "output_norm")):
            fitted = Trak(measure=measure).fit(self.store)
            found[name] = Method(lambda d, f=fitted: self._scored(f.damped(d)), DAMPINGS)
        found["EKFAC"] = Method(lambda _: self.ekfac())
        found["unlearning"] = Method(self.unlearning(), (0.01, 1.0))
        return found

    def pixels(self) -> Tensor:
        """Cosines of pixels."""
        return similarity(*(pixel_features((p.images + 1) / 2) for p in (self.queries, self.training)))

    def clip(self) -> Tensor:
        """Cosines of features of the tiny-clip that the study was made with."""
        return cosines(self.study)

    def ekfac(self, measure: str = "loss") -> Tensor:
        """Influence by kronfluence, at its own damping."""
        train, queries = self.training.examples(), self.queries.examples()
        return kronecker_scores(
            self.task(5, (measure,)),
            train,
            queries,
            self.folder / f"ekfac-{measure}",
            batch_size=16,
            damping=None,
        )

    def unlearning(
        self, parameters: str | Sequence[str] = "all", step: float | None = None
    ) -> Callable[[float], Tensor]:
        """Scores by unlearning, with the Fisher information made once."""
        task, train = self.task(10, parameters=parameters), self.training.examples()
        queries = self.queries.examples()
        queries["index"] = torch.arange(len(queries["latents"]))
        fisher = fisher_diagonal(task, train)
        return lambda damping: unlearning_scores(
            task, train, queries, step=step, fisher=fisher, damping=damping
        )

    def _scored(self, scorer) -> Tensor:
        return scores(scorer, self.store, self.features)


def compare(
    truth: Truth, subject: Subject, names: Sequence[str] | None = None
) -> dict[str, tuple[Chosen, Chosen]]:
    """The score of each method on the held-out queries and on those the model drew."""
    methods = subject.methods()
    half, found = truth.losses.shape[1] // 2, {}
    for name in tqdm(names or list(methods), desc="scorers", unit="scorer", disable=None):
        made = {d: methods[name].make(d) for d in methods[name].dampings}
        found[name] = tuple(
            choose_damping(
                lambda d, m=made, p=part: m[d][p],
                methods[name].dampings,
                truth.subsets,
                truth.losses[:, part],
            )
            for part in (slice(0, half), slice(half, None))
        )
    return found


def table(found: dict[str, tuple[Chosen, Chosen]]) -> str:
    """The table of the docs."""
    rows = ["| scorer | held-out pictures | pictures the model drew |", "|---|---|---|"]
    for name, parts in found.items():
        cells = " | ".join(f"{p.mean:.2f} ({p.low:.2f} to {p.high:.2f})" for p in parts)
        rows.append(f"| {name} | {cells} |")
    return "\n".join(rows)


def named(truth: Truth) -> dict[str, Tensor]:
    """What is to be left out for `LEFT_OUT_QUERIES`, by method, and at random for each seed.

    D-TRAK's damping is the one that is best on all other queries of the same kind.
    """
    rows = list(LEFT_OUT_QUERIES)
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject.of(truth, Path(folder))
        fitted = Trak(measure="output_norm").fit(subject.store)
        half = truth.losses.shape[1] // 2
        named_by, clip = [], subject.clip()
        for kind in (range(half), range(half, 2 * half)):
            others = [i for i in kind if i not in rows]
            best = max(DAMPINGS, key=lambda d, o=others: _lds(truth, subject, fitted.damped(d), o))
            made = scores(fitted.damped(best), subject.store, subject.features)
            named_by.append(made[[i for i in rows if i in kind]])
    count = round(LEFT_OUT_SHARE * N_TRAIN)
    lots = [torch.Generator().manual_seed(20_000 + seed) for seed in SEEDS]
    return {
        "D-TRAK": top(torch.cat(named_by), LEFT_OUT_SHARE),
        "CLIP": top(clip[rows], LEFT_OUT_SHARE),
        "random": torch.stack([torch.randperm(N_TRAIN, generator=g)[:count] for g in lots]),
    }


def _lds(truth: Truth, subject: Subject, scorer: Trak, queries: list[int]) -> float:
    from methods_multimodal.data_attribution.evaluation import linear_datamodeling_score

    made = scores(scorer, subject.store, subject.features)[queries]
    return linear_datamodeling_score(made, truth.subsets, truth.losses[:, queries]).mean


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table; writes it into the docs if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--picture", type=Path, default=None, help="where bars of it go")
    parser.add_argument("--folder", type=Path, default=None, help="where gradient features are kept")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        truth = Truth.read()
        found = compare(truth, Subject.of(truth, options.folder or Path(scratch)))
    print(text := table(found))
    if options.picture:
        figure = Figure(figsize=(7, 5), layout="constrained")
        score_bars(
            found,
            figure.add_subplot(),
            groups=("held-out pictures", "pictures the model drew"),
            title="64 models retrained on random halves",
        )
        figure.savefig(options.picture, dpi=100)
    if options.write:
        head, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
