"""Statistics against slow, obvious versions of themselves, and against what was written by hand before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, jaccard_score, roc_auc_score
from torch import Tensor

from methods_multimodal.core.statistics import (
    auroc,
    bootstrap,
    correlation,
    iou,
    paired_interval,
    spearman,
)
from methods_multimodal.cross_attention import Effects, average_precision
from methods_multimodal.cross_attention import correlation as both_correlations
from methods_multimodal.data_attribution import detection, linear_datamodeling_score
from methods_multimodal.dissection.similarity import rank_reorder
from methods_multimodal.text_explanations import segmentation
from mm_adapters import InputError

# Activations after a ReLU: many are exactly zero, and the rest are few different numbers, as in bfloat16.
TIED = torch.relu(torch.randn(120, 7, generator=torch.Generator().manual_seed(0))).bfloat16().float()
CONTINUOUS = torch.randn(120, 7, generator=torch.Generator().manual_seed(1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ranks_by_counting(values: Tensor) -> Tensor:
    """Each value's rank: how many are smaller, and half of those that are equal."""
    smaller = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return smaller.double() + (equal.double() + 1) / 2


# ---- many columns at once ----------------------------------------------------------------------


@pytest.mark.parametrize("activations", [TIED, CONTINUOUS], ids=["ties", "no ties"])
def test_auroc_is_the_share_of_pairs_in_the_right_order(activations: Tensor) -> None:
    present = torch.rand(120, 4, generator=seeded(2)) < 0.3
    table = auroc(activations, present)
    for unit in range(7):
        for concept in range(4):
            on, off = activations[present[:, concept], unit], activations[~present[:, concept], unit]
            pairs = on[:, None] - off[None]
            wanted = float(((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean())
            assert float(table[unit, concept]) == pytest.approx(wanted, abs=1e-6)
            by_sklearn = roc_auc_score(present[:, concept].numpy(), activations[:, unit].numpy())
            assert float(table[unit, concept]) == pytest.approx(by_sklearn, abs=1e-6)


def test_correlation_of_all_columns_is_numpys_of_every_two() -> None:
    table = correlation(TIED, CONTINUOUS)
    for i in range(7):
        for j in range(7):
            wanted = np.corrcoef(TIED[:, i].double(), CONTINUOUS[:, j].double())[0, 1]
            assert float(table[i, j]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("a", [TIED, CONTINUOUS], ids=["ties", "no ties"])
def test_spearman_is_scipys_and_the_correlation_of_counted_ranks(a: Tensor) -> None:
    b = (TIED + CONTINUOUS).round(decimals=1)
    found = spearman(a, b)
    for i in range(7):
        assert float(found[i]) == pytest.approx(spearmanr(a[:, i], b[:, i]).statistic, abs=1e-12)
        counted = torch.stack([ranks_by_counting(x[:, i]) for x in (a, b)])
        assert float(found[i]) == pytest.approx(float(torch.corrcoef(counted)[0, 1]), abs=1e-6)


def test_spearman_of_what_never_varies_is_nan_without_a_warning() -> None:
    assert torch.isnan(spearman(torch.ones(5, 1), torch.rand(5, 1))).all()
    assert torch.isnan(spearman(torch.ones(1, 3), torch.rand(1, 3))).all()


def test_rank_correlation_of_effects_shares_ranks_between_equals() -> None:
    """By counted ranks; where nothing is equal it is what two argsorts gave before."""
    for one, two in ((TIED[:, 0], CONTINUOUS[:, 0]), (CONTINUOUS[:, 1], CONTINUOUS[:, 2])):
        pearson, rank = both_correlations(one, two)
        assert pearson == pytest.approx(np.corrcoef(one.double(), two.double())[0, 1], abs=1e-6)
        counted = torch.stack([ranks_by_counting(x) for x in (one, two)])
        assert rank == pytest.approx(float(torch.corrcoef(counted)[0, 1]), abs=1e-6)
    before = torch.stack([x.argsort().argsort().double() for x in (CONTINUOUS[:, 1], CONTINUOUS[:, 2])])
    assert rank == pytest.approx(float(torch.corrcoef(before)[0, 1]), abs=1e-6)


def test_rank_reorder_breaks_ties_by_order_as_two_stable_argsorts_did() -> None:
    similarity = (TIED * 4).round() / 4
    scores = rank_reorder(similarity, CONTINUOUS, top_share=0.5)
    values, top = CONTINUOUS.topk(60, 0)
    for unit in range(7):
        seen = similarity[top[:, unit]]
        order = seen.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        own = values[:, unit]
        change = (own[:, None] - own[order]).abs().pow(3).mean(0)
        by_chance = (own[:, None] - own[None]).abs().pow(3).mean()
        wanted = -(change / by_chance) / seen.mean(0).clamp_min(1e-7).pow(0.5)
        torch.testing.assert_close(scores[unit], wanted, rtol=0, atol=1e-6)


def test_detection_is_what_summed_ranks_gave() -> None:
    scores, planted = TIED[:, 0], torch.rand(120, generator=seeded(3)) < 0.2
    n = int(planted.sum())
    above = ranks_by_counting(scores)[planted].sum() - n * (n + 1) / 2
    assert detection(scores, planted) == pytest.approx(float(above / (n * (120 - n))), abs=1e-6)


# ---- maps and regions ---------------------------------------------------------------------------


def heat() -> tuple[Tensor, Tensor]:
    """Maps as attention gives them (a few values, many equal; smooth), and regions."""
    noise = torch.rand(6, 12, 12, generator=seeded(4))
    smooth = torch.nn.functional.avg_pool2d(noise[None], 3, 1, 1)[0]
    return torch.cat([(smooth[:3] * 20).round() / 20, smooth[3:]]), noise > 0.7


def test_iou_is_scikit_learns_and_zero_where_nothing_is() -> None:
    maps, regions = heat()
    wanted = [jaccard_score(r.flatten(), (m > 0.5).flatten()) for m, r in zip(maps, regions, strict=True)]
    torch.testing.assert_close(iou(maps > 0.5, regions), torch.tensor(wanted, dtype=torch.float32))
    assert iou(torch.zeros(2, 4, 4).bool(), torch.zeros(2, 4, 4).bool()).tolist() == [0.0, 0.0]


def test_average_precision_is_what_levels_summed_by_hand_gave() -> None:
    maps, regions = heat()
    for values, truth, found in zip(
        maps.flatten(1), regions.flatten(1), average_precision(maps, regions), strict=True
    ):
        levels, index = values.unique(return_inverse=True)
        hits = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, index, truth.double())
        count = torch.zeros_like(hits).index_add_(0, index, torch.ones_like(hits).new_ones(len(truth)))
        hits, count = hits.flip(0), count.flip(0)
        wanted = float((hits * hits.cumsum(0) / count.cumsum(0)).sum() / hits.sum())
        assert float(found) == pytest.approx(wanted, abs=1e-6)
        assert float(found) == pytest.approx(average_precision_score(truth, values), abs=1e-6)


def test_the_best_threshold_is_the_one_whose_scores_are_best() -> None:
    maps, regions = heat()
    options = [None, *(round(0.1 * i, 1) for i in range(1, 10))]
    scores = [segmentation.segmentation_scores(maps - 0.4, regions, t).mean_iou for t in options]
    assert segmentation.best_threshold(maps - 0.4, regions) == options[int(np.argmax(scores))]


# ---- intervals ----------------------------------------------------------------------------------


def drawn_again(n: int, n_resamples: int, seed: int) -> np.ndarray:
    """The cases that scipy draws with this seed."""
    return np.random.default_rng(seed).integers(0, n, (n_resamples, n))


def effects() -> tuple[Tensor, Tensor]:
    """What five parts change in ten pictures, and what the whole changes."""
    gap = 1 + 0.5 * torch.randn(10, generator=seeded(5))
    return gap * torch.rand(5, 1, generator=seeded(6)) + 0.1 * torch.randn(5, 10, generator=seeded(7)), gap


def old_interval(change: Tensor, gap: Tensor, picked: Tensor, level: float) -> Tensor:
    """As it was written by hand, given which cases are drawn."""
    ratios = change[:, picked].mean(-1) / gap[picked].mean(-1)
    return ratios.nanquantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]), dim=1)


def record(change: Tensor, gap: Tensor) -> Effects:
    zeros, all_ = torch.zeros(len(gap)), ((),) * len(change)
    control, named = torch.zeros_like(change), ("turned",) * len(gap)
    not_whole = (False,) * len(change)
    return Effects(change, zeros, gap, control, all_, all_, all_, "what", "metric", named, not_whole)


def test_the_interval_of_a_share_is_that_of_before_for_the_same_draws() -> None:
    change, gap = effects()
    share = record(change, gap).share(0.9, draws=500, seed=3)
    picked = torch.from_numpy(drawn_again(10, 500, 3))
    wanted = old_interval(change, gap, picked, 0.9)
    torch.testing.assert_close(torch.stack([share.low, share.high]), wanted, rtol=0, atol=1e-6)


def test_the_interval_of_a_share_is_that_of_before_but_for_the_draws() -> None:
    change, gap = effects()
    share = record(change, gap).share(draws=20_000)
    picked = torch.randint(10, (20_000, 10), generator=seeded())
    wanted = old_interval(change, gap, picked, 0.95)
    width = (wanted[1] - wanted[0]).min()
    assert (torch.stack([share.low, share.high]) - wanted).abs().max() < 0.05 * width


def test_resamples_without_any_whole_effect_are_left_out() -> None:
    change, gap = torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([0.0, 1.0, 2.0])
    share = record(change, gap).share(draws=500)  # One resample in 27 is 0 / 0.
    wanted = old_interval(change, gap, torch.from_numpy(drawn_again(3, 500, 0)), 0.95)
    assert (share.low.item(), share.high.item()) == pytest.approx((0.5, 0.5)) == wanted[:, 0].tolist()


def test_one_case_has_no_interval_but_itself() -> None:
    share = record(torch.tensor([[0.5]]), torch.tensor([2.0])).share()
    assert share.mean.item() == share.low.item() == share.high.item() == 0.25
    low, high = paired_interval(np.mean, np.array([[1.0], [2.0]]))
    assert low.tolist() == high.tolist() == [1.0, 2.0]


def test_the_interval_of_an_lds_is_that_of_before_for_the_same_draws() -> None:
    subsets = torch.rand(24, 60, generator=seeded(8)) < 0.5
    scores = torch.randn(2, 60, generator=seeded(9))
    losses = -(subsets.float() @ scores.T) + 3 * torch.randn(24, 2, generator=seeded(10))
    estimate = linear_datamodeling_score(scores, subsets, losses, seed=4)
    rng, predicted, means = np.random.default_rng(4), subsets.double() @ scores.double().T, []
    # Scipy draws all resamples of one sample before those of the next.
    rows, columns = (rng.integers(0, n, (1000, n)) for n in (24, 2))
    for row, column in zip(rows, columns, strict=True):
        each = [spearmanr(predicted[row, c], -losses[row, c]).statistic for c in column]
        means.append(np.mean(each))
    wanted = np.quantile(means, [0.025, 0.975])
    assert (estimate.low, estimate.high) == pytest.approx(tuple(wanted), abs=1e-6)


def test_the_interval_of_one_querys_lds_draws_subsets_only() -> None:
    subsets = torch.rand(24, 60, generator=seeded(8)) < 0.5
    scores = torch.randn(1, 60, generator=seeded(9))
    losses = -(subsets.float() @ scores.T) + 3 * torch.randn(24, 1, generator=seeded(10))
    estimate = linear_datamodeling_score(scores, subsets, losses)
    assert estimate.low < estimate.mean < estimate.high


def old_bootstrap(table: Tensor, n_resamples: int, generator: torch.Generator) -> Tensor:
    """Means as they were drawn by hand: clusters, and draws within each."""
    means = []
    for _ in range(n_resamples):
        rows = torch.randint(len(table), (len(table),), generator=generator)
        columns = torch.randint(table.shape[1], table.shape, generator=generator)
        means.append(table[rows].gather(1, columns).mean())
    return torch.stack(means)


def clustered(n: int = 16, draws: int = 3) -> Tensor:
    """Queries that differ, and seeds that differ less."""
    return torch.randn(n, 1, generator=seeded(11)) + 0.3 * torch.randn(n, draws, generator=seeded(12))


def test_a_clustered_interval_equals_drawing_one_value_at_a_time() -> None:
    """A loop over resamples, clusters and draws, with the numbers that the generator gives."""
    table, n_resamples = clustered(5, 3).double(), 40
    estimate = bootstrap(table, n_resamples=n_resamples, rng=np.random.default_rng(1))
    rng = np.random.default_rng(1)
    rows, picked = rng.integers(0, 5, (n_resamples, 5)), rng.integers(3, size=(n_resamples, 5, 3))
    means = []
    for i in range(n_resamples):
        drawn = [float(table[row, picked[i, at, k]]) for at, row in enumerate(rows[i]) for k in range(3)]
        means.append(sum(drawn) / len(drawn))
    wanted = np.quantile(means, [0.025, 0.975])
    assert (estimate.low, estimate.high) == pytest.approx(tuple(wanted), abs=1e-6)
    assert estimate.mean == pytest.approx(float(table.mean()), abs=1e-6)
    torch.testing.assert_close(estimate.values, table.mean(1).float())


def test_a_clustered_interval_is_that_of_before_but_for_the_draws() -> None:
    table = clustered()
    estimate = bootstrap(table, n_resamples=20_000)
    wanted = old_bootstrap(table.double(), 20_000, seeded()).quantile(torch.tensor([0.025, 0.975]).double())
    width = float(wanted[1] - wanted[0])
    assert (estimate.low, estimate.high) == pytest.approx(tuple(wanted.tolist()), abs=0.03 * width)


def test_draws_of_one_cluster_do_not_count_as_clusters() -> None:
    """The same numbers taken for independent would give an interval half as wide."""
    table = torch.randn(12, 1, generator=seeded(13)).expand(12, 9) + 1e-3 * torch.randn(12, 9)
    apart, alike = bootstrap(table.reshape(-1)), bootstrap(table)
    assert alike.high - alike.low > 2 * (apart.high - apart.low)


def test_a_clustered_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Clusters of two to five draws; 30 clusters, so 95 % is 93 % or so by percentiles."""
    generator, rng, inside = seeded(14), np.random.default_rng(0), 0
    for _ in range(200):
        rows = []
        for i in range(30):
            own = 1 + torch.randn(1, generator=generator)
            rows.append(own + torch.randn(2 + i % 4, generator=generator))
        estimate = bootstrap(rows, n_resamples=400, rng=rng)
        inside += estimate.low < 1 < estimate.high
    assert 178 <= inside <= 199


def test_clusters_of_other_sizes_count_alike() -> None:
    rows = [torch.tensor([1.0]), torch.tensor([3.0, 5.0]), torch.tensor([0.0, 0.0, 3.0])]
    estimate = bootstrap(rows)
    assert estimate.mean == pytest.approx((1 + 4 + 1) / 3)
    assert estimate.values.tolist() == [1.0, 4.0, 1.0]
    assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 5
    # Padding is no draw: a cluster of sixes alone never gives less than six.
    lone = bootstrap([torch.tensor([6.0, 6.0]), torch.full((5,), 6.0)])
    assert (lone.low, lone.mean, lone.high) == (6.0, 6.0, 6.0)


def test_a_paired_difference_is_narrow_where_both_move_together() -> None:
    base = clustered()
    better = base + 0.1 + 0.01 * torch.randn(base.shape, generator=seeded(15))
    paired = bootstrap(better, than=base)
    assert 0.09 < paired.low < paired.mean < paired.high < 0.11
    wanted = bootstrap(better - base)
    assert (paired.low, paired.high) == pytest.approx((wanted.low, wanted.high), abs=1e-8)
    # With draws that do not belong together, seeds add their noise; queries still do not.
    unpaired = bootstrap(better, than=base[:, :2], paired_draws=False)
    assert unpaired.high - unpaired.low > 5 * (paired.high - paired.low)
    queries = bootstrap(base)
    assert unpaired.high - unpaired.low < queries.high - queries.low


def test_a_seed_or_a_generator_will_do_and_a_generator_moves_on() -> None:
    table, rng = clustered(), np.random.default_rng(7)
    first, second = bootstrap(table, rng=rng), bootstrap(table, rng=rng)
    assert first.low == bootstrap(table, rng=7).low
    assert first.low != second.low


def test_one_cluster_is_drawn_within_and_one_value_is_itself() -> None:
    one = bootstrap(torch.tensor([[1.0, 2.0, 6.0]]))
    assert 1 <= one.low < 3 == one.mean < one.high <= 6
    lone = bootstrap(torch.tensor([2.0]))
    assert (lone.low, lone.mean, lone.high) == (2.0, 2.0, 2.0)


def test_what_cannot_be_drawn_from_is_said() -> None:
    with pytest.raises(InputError, match="same clusters"):
        bootstrap(torch.rand(3, 2), than=torch.rand(4, 2))
    with pytest.raises(InputError, match="paired_draws=False"):
        bootstrap(torch.rand(3, 2), than=torch.rand(3, 4))
    with pytest.raises(InputError, match="nothing to draw from"):
        bootstrap([torch.rand(2), torch.rand(0)])
