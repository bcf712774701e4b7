"""Statistics that neither scikit-learn nor scipy.stats has: many columns at once, draws within clusters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from methods_multimodal.core.record import Record
from mm_adapters import InputError

Seed = int | np.random.Generator
# [cluster, draw ...], or a tensor of draws for each cluster.
Values = Float[Tensor, "_ ..."] | Sequence[Float[Tensor, " _"]]


@dataclass(frozen=True)
class Estimate(Record):
    """A mean over clusters and its interval by bootstrap; `values` are the clusters' own means."""

    mean: float
    low: float
    high: float
    values: Float[Tensor, " cluster"]


def auroc(
    activations: Float[Tensor, "image unit"], present: Bool[Tensor, "image concept"]
) -> Float[Tensor, "unit concept"]:
    """How often a unit is stronger on an image with the concept than on one without; 0.5 is chance.

    NaN for a concept that all images show, or none. Ties count one half. scikit-learn's `roc_auc_score`
    takes one column at a time and sorts it again for every concept; here each unit is ranked once.
    """
    ranks = torch.from_numpy(scipy.stats.rankdata(activations.double().cpu().numpy(), axis=0))
    shown = present.double().cpu()
    n_with = shown.sum(0)
    n_without = len(shown) - n_with
    above = ranks.T @ shown - n_with * (n_with + 1) / 2
    # 0 / 0 is NaN, which is what it should be.
    return (above / (n_with * n_without)).float()


def correlation(
    a: Float[Tensor, "image unit"], b: Float[Tensor, "image concept"]
) -> Float[Tensor, "unit concept"]:
    """Pearson's correlation over images of every column of `a` with every column of `b`; 0 for a constant.

    `numpy.corrcoef` would correlate the units with each other too.
    """
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    return ((a / a.norm(dim=0).clamp_min(1e-12)).T @ (b / b.norm(dim=0).clamp_min(1e-12))).float()


def spearman(a: Float[Tensor, "row column"], b: Float[Tensor, "row column"]) -> Float[Tensor, " column"]:
    """Spearman's correlation of each column of `a` with the same column of `b`; NaN if either is constant.

    `scipy.stats.spearmanr` correlates every column with every other.
    """
    if len(a) < 2:
        return torch.full((a.shape[1],), torch.nan, dtype=torch.float64)
    ranks = [scipy.stats.rankdata(x.double().cpu().numpy(), axis=0) for x in (a, b)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
        pearson: Any = scipy.stats.pearsonr(*ranks, axis=0)
    return torch.from_numpy(np.asarray(pearson.statistic))


def iou(
    found: Bool[Tensor, "*mask height width"], regions: Bool[Tensor, "*mask height width"]
) -> Float[Tensor, "*mask"]:
    """The area of what both have over that of what either has; 0 if neither has any.

    scikit-learn's `jaccard_score` takes one pair at a time, a hundred times slower.
    """
    both, either = (found & regions).sum((-2, -1)), (found | regions).sum((-2, -1))
    return both / either.clamp(min=1)


def paired_interval(
    statistic: Callable[..., NDArray[np.float64]],
    *samples: NDArray[np.float64],
    level: float = 0.95,
    n_resamples: int = 2000,
    rng: Seed = 0,
) -> Float[np.ndarray, "bound ..."]:
    """A statistic's lower and upper bound when cases (all samples' last axis) are drawn again, together.

    `statistic` takes the samples and `axis`. Resamples in which it is NaN (0 / 0) are left out, as
    `scipy.stats.bootstrap` does not; with a single case, which that refuses, both bounds are the statistic.
    """
    if samples[0].shape[-1] < 2:
        return np.stack([statistic(*samples, axis=-1)] * 2)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        found = scipy.stats.bootstrap(
            samples,
            statistic,
            axis=-1,
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=n_resamples,
            rng=np.random.default_rng(rng),
        )
        return _bounds(found.bootstrap_distribution, level)


def bootstrap(
    values: Values,
    *,
    than: Values | None = None,
    paired_draws: bool = True,
    level: float = 0.95,
    n_resamples: int = 10_000,
    rng: Seed = 0,
) -> Estimate:
    """The mean of values and its interval, drawing clusters again, then the draws within each.

    A cluster is what was drawn independently: a query, a prompt, a training seed. Its draws (all further
    axes, or the values of one tensor of a list) are alike among themselves, so drawing them all from one
    pot would make the interval too narrow. Every cluster counts alike, however many draws it has.

    Args:
        values: [cluster, draw ...], or a tensor of draws for each cluster.
        than: the same clusters under another method; the estimate is then of the difference.
        paired_draws: whether draw i of `values` and of `than` belong together (one seed, say).
        level: the share of resamples within the interval.
        n_resamples: how many there are.
        rng: a seed, or a generator, which is then moved on.

    Raises: InputError if `than` has other clusters, or other draws though they are paired.
    """
    sides = [_Clusters.of(values)] + ([] if than is None else [_Clusters.of(than)])
    if len({len(side.counts) for side in sides}) > 1:
        raise InputError(
            f"{len(sides[0].counts)} clusters and {len(sides[1].counts)} were given: a difference needs the "
            "same clusters."
        )
    if than is not None and paired_draws:
        if (sides[0].counts != sides[1].counts).any():
            raise InputError("Paired draws need as many in each cluster of both. Pass paired_draws=False.")
        sides = [_Clusters(sides[0].table - sides[1].table, sides[0].counts)]
    rng = np.random.default_rng(rng)

    def mean(clusters: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        first, *other = (side.drawn(clusters, rng).mean(-1) for side in sides)
        return first - other[0] if other else first

    n = len(sides[0].counts)
    if n > 1:
        # The clusters' numbers are the sample; the statistic draws within those it is given.
        found = scipy.stats.bootstrap(
            (np.arange(n),),
            mean,
            vectorized=True,
            method="percentile",
            n_resamples=n_resamples,
            rng=rng,
            batch=max(1, 2**22 // sum(side.table.size for side in sides)),
        )
        low, high = _bounds(found.bootstrap_distribution, level)
    else:
        low, high = _bounds(mean(np.zeros((n_resamples, 1), np.int64)), level)
    own, *other = (side.means() for side in sides)
    each = own - other[0] if other else own
    return Estimate(float(each.mean()), float(low), float(high), torch.from_numpy(each).float())


@dataclass(frozen=True)
class _Clusters:
    """Draws by cluster, padded with zeros to one length."""

    table: Float[np.ndarray, "cluster draw"]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, values: Values) -> _Clusters:
        rows = [row.detach().double().cpu().flatten() for row in values]
        counts = np.array([len(row) for row in rows])
        if not len(rows) or not counts.all():
            raise InputError("There is nothing to draw from: every cluster needs at least one value.")
        return cls(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).numpy(), counts)

    def means(self) -> NDArray[np.float64]:
        return self.table.sum(-1) / self.counts

    def drawn(self, clusters: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
        """The means [resample, cluster] of these clusters' draws, drawn again within each."""
        width = self.table.shape[1]
        if width == 1:
            return self.table[clusters, 0]
        counts = self.counts[clusters][..., None]
        picked = rng.integers(counts, size=(*clusters.shape, width))
        values = np.where(np.arange(width) < counts, self.table[clusters[..., None], picked], 0.0)
        return values.sum(-1) / counts[..., 0]


def _bounds(
    distribution: Float[np.ndarray, "*part resample"], level: float
) -> Float[np.ndarray, "bound ..."]:
    return np.nanquantile(distribution, [(1 - level) / 2, (1 + level) / 2], axis=-1)
