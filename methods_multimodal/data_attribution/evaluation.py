"""How good scores of training examples are: against retraining on subsets, known sources, planted mistakes.

Scores are [query, example], positive where the example helped the query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score
from torch import Tensor

from methods_multimodal.core.generators import generator
from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import Estimate, spearman
from mm_adapters import InputError

_RESAMPLES = 1000


@dataclass(frozen=True)
class Chosen(Record):
    """An LDS whose damping was chosen, for each query, on other queries than that one.

    `damping` is the one chosen for each query; `scores` are the scores made with it.
    """

    mean: float
    low: float
    high: float
    values: Float[Tensor, " query"]
    damping: Float[Tensor, " query"]
    scores: Float[Tensor, "query example"]


def linear_datamodeling_score(
    scores: Float[Tensor, "query example"],
    subsets: Bool[Tensor, "subset example"],
    losses: Float[Tensor, "subset query"],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Whether summed scores order retrained models as their losses do: a Spearman correlation a query.

    `losses` [subset, query] are those of models trained on the examples that `subsets` marks. The more
    help a subset holds, the lower the loss should be. The interval resamples queries and subsets.

    Source: Park et al. 2023, arXiv 2303.14186, definition 2.4; for losses Zheng et al. 2024, arXiv
    2311.00500.
    Raises: InputError if the shapes do not belong together, or a query's losses never vary.
    """
    _check(scores, subsets, losses)
    predicted, negative = subsets.double() @ scores.double().T, -losses.double()
    per_query = _rank_correlation(predicted, negative)
    crossed = [np.arange(n) for n in losses.shape if n > 1]  # A single query is not drawn.

    def mean(rows: NDArray[np.int64], *columns: NDArray[np.int64]) -> float:
        at = np.ix_(rows, columns[0] if columns else np.zeros(1, np.int64))
        return float(_rank_correlation(predicted[at], negative[at]).mean())

    low, high = bootstrap(
        crossed,
        mean,
        vectorized=False,
        n_resamples=_RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return Estimate(float(per_query.mean()), float(low), float(high), per_query.float())


def choose_damping(
    make: Callable[[float], Float[Tensor, "query example"]],
    dampings: Sequence[float],
    subsets: Bool[Tensor, "subset example"],
    losses: Float[Tensor, "subset query"],
    *,
    folds: int = 4,
    level: float = 0.95,
    seed: int = 0,
) -> Chosen:
    """The LDS of a scorer with a damping: each fold of queries gets the one that is best on the others.

    `make(damping)` gives the scores. Choosing on the queries that are then judged, as is often done,
    says more of the grid than of the scorer.

    Raises: InputError for fewer than two folds or queries than folds.
    """
    n_queries = losses.shape[1]
    if not 2 <= folds <= n_queries:
        raise InputError(f"{n_queries} queries can be parted into 2 to {n_queries} folds, not {folds}.")
    if not dampings:
        raise InputError("There is no damping to choose from.")
    candidates = torch.stack([make(damping) for damping in dampings])
    for scores in candidates:
        _check(scores, subsets, losses)
    each = torch.stack(
        [_rank_correlation(subsets.double() @ scores.double().T, -losses.double()) for scores in candidates]
    )
    fold = torch.randperm(n_queries, generator=generator(seed)) % folds
    best = torch.empty(n_queries, dtype=torch.long)
    for number in range(folds):
        best[fold == number] = each[:, fold != number].mean(1).argmax()
    scores = candidates[best, torch.arange(n_queries)]
    score = linear_datamodeling_score(scores, subsets, losses, level=level, seed=seed)
    damping = torch.tensor(dampings, dtype=torch.float32)[best]
    return Chosen(score.mean, score.low, score.high, score.values, damping, scores)


def source_recall(
    scores: Float[Tensor, "query example"], sources: Bool[Tensor, "query example"]
) -> Float[Tensor, " query"]:
    """Of each query's k known sources, the share among its k highest scores.

    Raises: InputError for a query without a source.
    """
    counts = sources.sum(1)
    if scores.shape != sources.shape or not bool(counts.all()):
        raise InputError(
            f"Every query needs a known source; scores are {list(scores.shape)}, sources "
            f"{list(sources.shape)}, and {int((counts == 0).sum())} queries have none."
        )
    recalls = []
    for row, known, count in zip(scores, sources, counts.tolist(), strict=True):
        recalls.append(known[row.topk(count).indices].float().mean())
    return torch.stack(recalls)


def detection(scores: Float[Tensor, " example"], planted: Bool[Tensor, " example"]) -> float:
    """How surely a score tells planted mistakes from the rest: the area under the ROC curve.

    With self-influence for scores this finds mislabelled examples; with the similarity to the nearest
    other example, duplicates.

    Source: Koh and Liang 2017, arXiv 1703.04730, section 5.4 (mislabelled examples by self-influence).
    Raises: InputError unless some are planted and some are not.
    """
    n, n_planted = len(planted), int(planted.sum())
    if scores.shape != planted.shape or not 0 < n_planted < n:
        raise InputError(f"{n_planted} of {n} examples are planted; at least one must be, and one not.")
    return float(roc_auc_score(planted.cpu().numpy(), scores.cpu().numpy()))


def duplicates(
    between: Float[Tensor, "example example"], n: int
) -> tuple[Int[Tensor, "pair two"], Float[Tensor, " pair"]]:
    """The `n` pairs of examples that are most alike, by their scores for each other, and how alike.

    A pair's likeness is the geometric mean of both scores over the scores for themselves.
    """
    self_scores = between.diagonal().clamp_min(torch.finfo(between.dtype).tiny)
    alike = (
        between / (self_scores[:, None] * self_scores).sqrt()
        + (between / (self_scores[:, None] * self_scores).sqrt()).T
    ) / 2
    rows, columns = torch.triu_indices(len(between), len(between), offset=1)
    best = alike[rows, columns].topk(min(n, len(rows)))
    return torch.stack([rows[best.indices], columns[best.indices]], 1), best.values


def _rank_correlation(
    predicted: Float[Tensor, "subset query"], losses: Float[Tensor, "subset query"]
) -> Float[Tensor, " query"]:
    """Of each query; 0 for one whose numbers never vary."""
    return spearman(predicted, losses).nan_to_num(0.0)


def _check(scores: Tensor, subsets: Tensor, losses: Tensor) -> None:
    shape = (losses.shape[1], subsets.shape[1])
    if tuple(scores.shape) != shape or len(subsets) != len(losses):
        raise InputError(
            f"{len(subsets)} subsets of {subsets.shape[1]} examples and losses {list(losses.shape)} "
            f"[subset, query] ask for scores {list(shape)}, not {list(scores.shape)}."
        )
    if len(losses) < 3 or bool((losses == losses[:1]).all(0).any()):
        raise InputError("A query's losses must differ between subsets, of which there are at least three.")
