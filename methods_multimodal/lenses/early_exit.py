"""How good an answer is if the model stops at a layer, or as soon as a layer is sure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from methods_multimodal.core.generators import generator
from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.lenses.reading import LensReading
from mm_adapters import InputError


@dataclass(frozen=True)
class EarlyExit(Record):
    """Whether each layer's strongest candidate is right, and how sure the layer is of it."""

    right: Bool[Tensor, "row layer"]
    confidence: Float[Tensor, "row layer"]
    layers: tuple[str, ...]

    def accuracy(self, layer: int) -> Estimate:
        """The share that is right after one layer, with its interval over rows."""
        return bootstrap(self.right[:, [layer]].float())

    def exits(self, threshold: float) -> Int[Tensor, " row"]:
        """The first layer of each row that is at least so sure; the last one if none is."""
        sure = self.confidence >= threshold
        sure[:, -1] = True
        return sure.int().argmax(1)

    def accuracy_at(self, threshold: float) -> Estimate:
        """The share that is right where each row stops."""
        return bootstrap(self.right.gather(1, self.exits(threshold)[:, None]).float())

    def accuracy_at_shuffled(self, threshold: float, seed: int = 0) -> Estimate:
        """The null: as many rows stop at each layer, but which ones is drawn at random."""
        exits = self.exits(threshold)
        order = torch.randperm(len(exits), generator=generator(seed))
        return bootstrap(self.right.gather(1, exits[order][:, None]).float())

    def mean_layers(self, threshold: float) -> float:
        """How many blocks a row runs through on average."""
        return float(self.exits(threshold).float().mean())

    def choose_threshold(self, loss: float = 0.01) -> float:
        """The lowest confidence that costs at most `loss` of the last layer's accuracy on these rows.

        To be judged on other rows than it is chosen on.
        """
        least = float(self.right[:, -1].float().mean()) - loss
        for threshold in self.confidence.flatten().unique().tolist():
            exits = self.exits(threshold)
            if float(self.right.gather(1, exits[:, None]).float().mean()) >= least:
                return threshold
        return float("inf")


def early_exit(reading: LensReading, answers: Int[Tensor, " row"] | Sequence[int]) -> EarlyExit:
    """What each layer of a lens would have answered.

    `answers` are the numbers of the right candidates, one for each entry of the reading. A layer's confidence
    is its largest probability (of scores that are no logits, their softmax over the candidates).

    Source: Schuster et al. 2022, arXiv 2207.07061 (exit by the softmax' confidence).
    Raises: InputError for another number of answers than entries, or a number that is no candidate.
    """
    truth = torch.as_tensor(answers)
    n, _, candidates = reading.scores.shape
    if truth.shape != (n,) or not bool(((truth >= 0) & (truth < candidates)).all()):
        raise InputError(
            f"The reading has {n} entries and {candidates} candidates: give one candidate's number for each."
        )
    values = reading.shares if reading.total is None else reading.probabilities
    confidence, said = values.max(-1)
    right = said == truth.to(said.device)[:, None]
    return EarlyExit(right=right.cpu(), confidence=confidence.float().cpu(), layers=reading.layers)


def best_constant(answers: Int[Tensor, " row"]) -> float:
    """How often the commonest answer is right: what guessing can reach."""
    return float(answers.bincount().max()) / len(answers)
