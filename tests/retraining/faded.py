"""Retrained without a tenth of pictures that captions say little of: what D-TRAK, CLIP or chance names.

    python -m tests.retraining.subsets --work FOLDER

makes `faded.safetensors` too: a full model's weights (fp16), what each method names for new pictures, and
their losses without that. D-TRAK reads this one model; three seeds judge what it names.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.data_attribution.counterfactual import LeftOut, leave_out, top
from methods_multimodal.data_attribution.scorers import scores
from methods_multimodal.data_attribution.trak import Trak
from tests.retraining.model import losses, model_of, train, train_together
from tests.retraining.pictures import N_FADED, N_TRAIN, faded_pictures, faded_queries
from tests.retraining.scores import Subject
from tests.retraining.subsets import LEFT_OUT_SHARE, SEEDS, write
from tests.retraining.truth import FOLDER, unpacked

# Fixed before: this set's kind was tried with it, on pictures of another seed.
DAMPING = 0.1
# Models trained side by side.
TOGETHER = 8
# So many random tenths; a query has one of them.
N_RANDOM = 3


@dataclass(frozen=True)
class Faded:
    """The shipped file: the weights of the first seed's full model, and what was left out for the queries."""

    weights: dict[str, Tensor]
    left_out: LeftOut

    @classmethod
    def read(cls, folder: Path = FOLDER) -> Faded:
        """The shipped file, or one just made."""
        found = unpacked(folder / "faded.safetensors")
        removed = {name: rows.long() for name, rows in found["removed"].items()}
        weights = {name: value.float() for name, value in found["weights"].items()}
        return cls(weights, LeftOut(found["full"], found["without"], removed))


def named(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is left out for each query, by method, [query, picture]."""
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject([weights], faded_pictures(), faded_queries(), Path(folder), "faded")
        dtrak = scores(Trak(measure="output_norm", damping=DAMPING), subject.store, subject.features)
    lots = [torch.Generator().manual_seed(30_000 + number) for number in range(N_RANDOM)]
    by_lot = torch.stack([torch.rand(N_TRAIN, generator=g) for g in lots])
    return {
        name: top(made, LEFT_OUT_SHARE)
        for name, made in (
            ("random", by_lot[[query % N_RANDOM for query in range(N_FADED)]]),
            ("D-TRAK", dtrak),
            ("CLIP", subject.clip()),
        )
    }


def pending(
    removed: dict[str, Tensor], path: Callable[[Sequence[int], int], Path]
) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """Which runs without something are not there yet, a few of one seed at a time."""
    rows = torch.cat([removed[name] for name in sorted(removed)]).tolist()
    kept = {tuple(i for i in range(N_TRAIN) if i not in gone) for gone in map(set, rows)}
    for seed in SEEDS:
        todo = sorted(each for each in kept if not path(each, seed).is_file())
        bar = tqdm(range(0, len(todo), TOGETHER), desc=f"without a tenth, seed {seed}", unit="group")
        yield from ((seed, todo[start : start + TOGETHER]) for start in bar)


def make(work: Path) -> dict[str, Tensor]:
    """All runs that are not in the folder yet; what is shipped of them."""
    known, queries, first = faded_pictures(), faded_queries(), work / "weights-faded.safetensors"
    if not first.is_file():
        model = train(known, range(N_TRAIN), SEEDS[0])
        write({name: value.half() for name, value in model.state_dict().items()}, first)
    # What is shipped is what is measured.
    weights = {name: value.float() for name, value in load_file(first).items()}

    def path(kept: Sequence[int], seed: int) -> Path:
        run = hashlib.sha256(repr((tuple(kept), seed)).encode()).hexdigest()[:16]
        return work / f"faded-{run}.safetensors"

    def retrain(kept: Sequence[int], seed: int) -> Tensor:
        if not path(kept, seed).is_file():
            again = len(kept) < N_TRAIN or seed != SEEDS[0]
            model = train(known, kept, seed) if again else model_of(weights)
            write({"queries": losses(model, queries)}, path(kept, seed))
        return load_file(path(kept, seed))["queries"]

    picks = work / "removed-faded.safetensors"
    if not picks.is_file():
        write(named(weights), picks)
    removed = load_file(picks)
    for seed, parts in pending(removed, path):
        for kept, model in zip(parts, train_together(known, parts, seed), strict=True):
            write({"queries": losses(model, queries)}, path(kept, seed))
    found = leave_out(removed, retrain, N_TRAIN, SEEDS)
    return {
        "full": found.full,
        **{f"without/{name}": value for name, value in found.without.items()},
        **{f"removed/{name}": value.to(torch.int16) for name, value in found.removed.items()},
        **{f"weights/{name}": value.half() for name, value in weights.items()},
    }
