"""Which dimensions of a vector hold a variable: found one after the other by a probe of any subset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.probing.labels import Column, Labels, Split, check_split, split_rows
from mm_adapters import InputError


@dataclass(frozen=True)
class IntrinsicProbe(Record):
    """The dimensions that say most about a variable, in the order they were picked, and what the first k say.

    `right[k - 1, row]` is whether the first k dimensions get a test row right. `information[k - 1]`, in bits,
    is a lower bound on what they say about it: its entropy less the cross entropy on the test rows. The
    `random` ones are of as many dimensions drawn at random.
    """

    dimensions: Int[Tensor, " k"]
    right: Bool[Tensor, "k row"]
    information: Float[Tensor, " k"]
    random_accuracy: Float[Tensor, "draw k"]
    random_information: Float[Tensor, "draw k"]
    entropy: float
    guess: float
    variable: str

    @property
    def accuracy(self) -> Float[Tensor, " k"]:
        """The share of test rows that the first k dimensions get right."""
        return self.right.double().mean(1)

    def above_random(self, k: int) -> Estimate:
        """How far the accuracy of the first k is above that of k random ones, over draws.

        Raises: InputError if fewer were picked.
        """
        if not 1 <= k <= len(self.dimensions):
            raise InputError(f"k={k}: {len(self.dimensions)} dimensions were picked.")
        return bootstrap((self.accuracy[k - 1] - self.random_accuracy[:, k - 1])[:, None], n_resamples=2000)


def find_dimensions(
    rows: Float[Tensor, "row width"],
    values: Column,
    k: int,
    *,
    variable: str = "",
    split: Split | None = None,
    shrinkage: float = 0.2,
    n_random: int = 20,
    seed: int = 0,
) -> IntrinsicProbe:
    """Picks the dimensions whose values say most about a variable, one after the other.

    The probe is a Gaussian for each class, fitted once: that of any subset of dimensions follows from it. The
    next dimension is the one with which the validation rows' labels are likeliest.

    Args:
        rows: What is probed, of one place.
        values: Each row's value of the variable.
        k: How many dimensions to pick.
        variable: What to call it.
        split: Which rows fit, choose and judge (None: 60, 20 and 20 % at random).
        shrinkage: How much of each class's covariance is the diagonal of their mean, in (0, 1].
        n_random: How many times k random dimensions are drawn.
        seed: Of the split and the draws.

    Source: Torroba Hennigen, Williams and Cotterell 2020, arXiv 2010.02812, sections 3 and 4 (with shrinkage
        in place of their prior).
    Raises: InputError for more dimensions than there are, no shrinkage, or labels that do not fit the rows.
    """
    width = rows.shape[1]
    if not 1 <= k <= width or not 0 < shrinkage <= 1 or n_random < 1:
        raise InputError(
            f"k={k} of {width} dimensions, shrinkage={shrinkage} in (0, 1], n_random={n_random}: at least 1."
        )
    if len(values) != len(rows):
        raise InputError(f"There are {len(values)} labels for {len(rows)} rows.")
    split = split_rows(len(rows), seed) if split is None else split
    check_split(split, len(rows))
    labels = Labels.of(variable, values, split)
    ids = torch.from_numpy(labels.ids)
    x = rows.double().cpu()
    gaussians = _fit(x[split.train], ids[split.train], len(labels.classes), shrinkage)
    picked: list[int] = []
    scores = _Given(gaussians, x[split.validation])
    for _ in range(k):
        log_p = scores.with_each().log_softmax(2)
        own = log_p.gather(2, rearrange(ids[split.validation], "row -> row 1 1").expand(-1, width, 1))
        fit = own[..., 0].mean(0)
        fit[picked] = -torch.inf
        picked.append(int(fit.argmax()))
        scores.add(picked[-1])
    truth = ids[split.test]
    entropy = float(-(p := truth.bincount() / len(truth))[p > 0].double() @ p[p > 0].double().log2())
    right, information = _judged(gaussians, x[split.test], truth, picked, entropy)
    rng = np.random.default_rng([seed, 4])
    drawn = [rng.permutation(width)[:k].tolist() for _ in range(n_random)]
    random = [_judged(gaussians, x[split.test], truth, dims, entropy) for dims in drawn]
    return IntrinsicProbe(
        dimensions=torch.tensor(picked),
        right=right,
        information=information,
        random_accuracy=torch.stack([one.double().mean(1) for one, _ in random]),
        random_information=torch.stack([bits for _, bits in random]),
        entropy=entropy,
        guess=labels.guess_rate(split),
        variable=variable,
    )


@dataclass(frozen=True)
class _Gaussians:
    """A Gaussian for each class, and how often each comes."""

    means: Float[Tensor, "klass width"]
    covariances: Float[Tensor, "klass width width"]
    log_prior: Float[Tensor, " klass"]


def _fit(x: Tensor, ids: Tensor, n_classes: int, shrinkage: float) -> _Gaussians:
    groups = [x[ids == c] for c in range(n_classes)]
    means = torch.stack([group.mean(0) for group in groups])
    plain = torch.stack([(g - m).T @ (g - m) / len(g) for g, m in zip(groups, means, strict=True)])
    counts = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    pooled = torch.einsum("c, c d -> d", counts / counts.sum(), plain.diagonal(dim1=1, dim2=2))
    # A dimension that never moves says nothing; its variance only has to be above zero.
    pooled = pooled.clamp_min(1e-12 + 1e-9 * float(pooled.max()))
    covariances = (1 - shrinkage) * plain + shrinkage * pooled.diag()
    return _Gaussians(means, covariances, (counts / counts.sum()).log())


class _Given:
    """Log densities of rows given the dimensions picked so far, and with each further one."""

    def __init__(self, gaussians: _Gaussians, x: Float[Tensor, "row width"]) -> None:
        self._of, self._x = gaussians, x
        self._picked: list[int] = []
        self.log_density = gaussians.log_prior.expand(len(x), -1)

    def with_each(self) -> Float[Tensor, "row width klass"]:
        """The log densities with each dimension added: its own, given those that were picked."""
        parts = []
        for mean, covariance, before in zip(
            self._of.means, self._of.covariances, self.log_density.T, strict=True
        ):
            variance, expected = covariance.diagonal().clone(), mean.expand_as(self._x)
            if self._picked:
                across = covariance[self._picked]
                slopes = torch.linalg.solve(across[:, self._picked], across)
                variance = variance - (across * slopes).sum(0)
                expected = expected + (self._x - mean)[:, self._picked] @ slopes
            variance = variance.clamp_min(1e-12)  # Of those picked nothing is left.
            squared = (self._x - expected).square() / variance
            parts.append(before[:, None] - 0.5 * (squared + (2 * torch.pi * variance).log()))
        return torch.stack(parts, 2)

    def add(self, dimension: int) -> None:
        """Takes a dimension in."""
        self.log_density = self.with_each()[:, dimension]
        self._picked.append(dimension)


def _judged(
    gaussians: _Gaussians, x: Tensor, truth: Tensor, dimensions: list[int], entropy: float
) -> tuple[Bool[Tensor, "k row"], Float[Tensor, " k"]]:
    """Whether the first 1, 2, ... of these dimensions are right, and how many bits they say."""
    scores, right, bits = _Given(gaussians, x), [], []
    for dimension in dimensions:
        scores.add(dimension)
        log_p = scores.log_density.log_softmax(1)
        right.append(log_p.argmax(1) == truth)
        bits.append(entropy + float(log_p.gather(1, truth[:, None]).mean()) / np.log(2))
    return torch.stack(right), torch.tensor(bits, dtype=torch.float64)
