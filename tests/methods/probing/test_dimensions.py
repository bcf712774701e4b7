"""Intrinsic probes find planted dimensions, in the order that whole Gaussians of every subset give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import mm_adapters as mm
from methods_multimodal.probing import IntrinsicProbe, find_dimensions, split_rows

RNG = np.random.default_rng(7)
IDS = RNG.integers(3, size=300)


def rows(width: int = 12) -> torch.Tensor:
    """Correlated noise; the last but three tells class 0 from the rest, dimension 3 class 1."""
    x = RNG.standard_normal((300, width)) @ RNG.standard_normal((width, width)) / width**0.5
    x[:, -4] += 6.0 * (IDS == 0)
    x[:, 3] += 4.0 * (IDS == 1)
    return torch.from_numpy(x)


def test_planted_dimensions_come_first_and_are_above_random_ones() -> None:
    found = find_dimensions(rows(), IDS, 5, variable="class")
    assert set(found.dimensions[:2].tolist()) == {3, 8}
    assert found.accuracy[1] > 0.9
    assert found.above_random(2).low > 0.2
    assert float(found.information[1]) <= found.entropy + 1e-9
    assert found.random_accuracy.shape == (20, 5)


def test_picks_and_scores_are_those_of_whole_gaussians_of_every_subset() -> None:
    x, split, shrinkage = rows(8), split_rows(300, 0), 0.3
    found = find_dimensions(x, IDS, 3, shrinkage=shrinkage)
    ids = torch.from_numpy(IDS)
    groups = [x[split.train][ids[split.train] == c] for c in range(3)]
    shares = torch.tensor([len(g) for g in groups]) / len(split.train)
    pooled = torch.stack([s * g.var(0, correction=0) for s, g in zip(shares, groups, strict=True)]).sum(0)
    covariances = [(1 - shrinkage) * torch.cov(g.T, correction=0) + shrinkage * pooled.diag() for g in groups]

    def log_p(part: torch.Tensor, dims: list[int]) -> torch.Tensor:
        densities = [
            MultivariateNormal(g.mean(0)[dims], c[dims][:, dims]).log_prob(x[part][:, dims])
            + s.double().log()
            for g, c, s in zip(groups, covariances, shares, strict=True)
        ]
        return torch.stack(densities, 1).log_softmax(1)

    picked: list[int] = []
    for k in range(3):
        fits = {
            d: float(log_p(split.validation, [*picked, d]).gather(1, ids[split.validation][:, None]).mean())
            for d in range(8)
            if d not in picked
        }
        picked.append(max(fits, key=fits.__getitem__))
        judged = log_p(split.test, picked)
        right = float((judged.argmax(1) == ids[split.test]).double().mean())
        assert float(found.accuracy[k]) == pytest.approx(right)
        p = ids[split.test].bincount().double() / len(split.test)
        bits = float(-(p * p.log2()).sum() + judged.gather(1, ids[split.test][:, None]).mean() / np.log(2))
        assert float(found.information[k]) == pytest.approx(bits, abs=1e-6)
    assert found.dimensions.tolist() == picked


def test_a_variable_that_is_nowhere_is_in_no_dimension(tmp_path) -> None:
    found = find_dimensions(rows(), RNG.integers(2, size=300), 4)
    assert float(found.information.max()) < 0.1
    assert abs(float(found.accuracy[3]) - 0.5) < 0.2
    back = IntrinsicProbe.load(found.save(tmp_path / "dimensions.safetensors"))
    assert torch.equal(back.right, found.right)


def test_a_dimension_that_never_moves_is_no_error() -> None:
    x = rows()
    x[:, 0] = 1.0
    assert 0 not in find_dimensions(x, IDS, 3).dimensions.tolist()


def test_more_dimensions_than_there_are_are_refused() -> None:
    with pytest.raises(mm.InputError, match="k=13 of 12"):
        find_dimensions(rows(), IDS, 13)
    with pytest.raises(mm.InputError, match="k=6"):
        find_dimensions(rows(), IDS, 5).above_random(6)
