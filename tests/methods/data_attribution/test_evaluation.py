"""Scores against retraining, where the answer is known or a slow version says it."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import roc_auc_score

from methods_multimodal.core.statistics import bootstrap, spearman
from methods_multimodal.data_attribution import module_task
from methods_multimodal.data_attribution.counterfactual import leave_out, tail_patch, top
from methods_multimodal.data_attribution.evaluation import (
    Chosen,
    _check,
    choose_damping,
    detection,
    duplicates,
    linear_datamodeling_score,
    source_recall,
)
from mm_adapters import InputError


def additive(noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each example gives each query, random halves, and the losses that makes."""
    lots = torch.Generator().manual_seed(seed)
    given = torch.randn(10, 60, generator=lots)
    subsets = torch.rand(64, 60, generator=lots) < 0.5
    losses = 50 - subsets.float() @ given.T
    return given, subsets, losses + noise * losses.std() * torch.randn(losses.shape, generator=lots)


def test_spearman_is_scipys_ties_included() -> None:
    lots = torch.Generator().manual_seed(0)
    a = torch.randint(0, 6, (40, 5), generator=lots).double()
    b = torch.randn(40, 5, generator=lots).double() + a
    wanted = [spearmanr(a[:, i], b[:, i]).statistic for i in range(5)]
    torch.testing.assert_close(spearman(a, b), torch.tensor(wanted, dtype=torch.float64))
    assert rankdata([2.0, 1.0, 2.0]).tolist() == [2.5, 1.0, 2.5]


def test_the_true_gains_have_an_lds_of_one_and_their_opposite_of_minus_one() -> None:
    given, subsets, losses = additive(0.0)
    assert linear_datamodeling_score(given, subsets, losses).mean == pytest.approx(1.0)
    assert linear_datamodeling_score(-given, subsets, losses).mean == pytest.approx(-1.0)


def test_the_lds_equals_scipys_loop_and_its_interval_holds_it() -> None:
    given, subsets, losses = additive(1.0)
    found = linear_datamodeling_score(given, subsets, losses)
    wanted = [spearmanr(subsets.float() @ g, -losses[:, i]).statistic for i, g in enumerate(given)]
    torch.testing.assert_close(found.values, torch.tensor(wanted, dtype=torch.float32))
    assert 0.3 < found.low < found.mean < found.high < 0.95


def test_the_interval_of_scores_made_by_lot_holds_zero() -> None:
    _, subsets, losses = additive(1.0)
    lots = torch.Generator().manual_seed(5)
    found = linear_datamodeling_score(torch.randn(10, 60, generator=lots), subsets, losses)
    assert found.low < 0 < found.high


def test_a_damping_is_never_chosen_by_the_queries_it_is_judged_on() -> None:
    given, subsets, losses = additive(0.5)
    # Damping i spoils all queries but number i: chosen on itself, each would look perfect.
    spoiled = torch.randn(given.shape, generator=torch.Generator().manual_seed(1))

    def make(damping: float) -> torch.Tensor:
        scores = spoiled.clone()
        scores[int(damping)] = given[int(damping)]
        return scores

    found = choose_damping(make, [float(i) for i in range(10)], subsets, losses, folds=10)
    assert all(int(damping) != query for query, damping in enumerate(found.damping.tolist()))
    optimistic = torch.stack([make(float(i))[i] for i in range(10)])
    assert linear_datamodeling_score(optimistic, subsets, losses).low > found.high


def test_a_damping_that_is_good_for_all_is_chosen(tmp_path) -> None:
    given, subsets, losses = additive(0.5)
    noise = torch.randn(given.shape, generator=torch.Generator().manual_seed(1))
    found = choose_damping(lambda d: given + d * noise, [10.0, 0.1, 3.0], subsets, losses)
    assert set(found.damping.tolist()) == {torch.tensor(0.1).item()}
    again = Chosen.load(found.save(tmp_path / "chosen.safetensors"))
    assert torch.equal(again.scores, found.scores)
    assert again.low == found.low


def test_source_recall_counts_known_sources_among_as_many_highest_scores() -> None:
    scores = torch.tensor([[5.0, 4.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    sources = torch.tensor([[True, False, True, False], [False, False, False, True]])
    assert source_recall(scores, sources).tolist() == [0.5, 1.0]
    with pytest.raises(InputError, match="needs a known source"):
        source_recall(scores, torch.zeros(2, 4, dtype=torch.bool))


def test_detection_is_the_area_under_the_roc_curve() -> None:
    lots = torch.Generator().manual_seed(0)
    planted = torch.rand(50, generator=lots) < 0.3
    scores = torch.randint(0, 9, (50,), generator=lots).float() + planted * 3
    assert detection(scores, planted) == pytest.approx(roc_auc_score(planted.numpy(), scores.numpy()))


def test_mislabelled_examples_have_the_largest_influence_on_themselves() -> None:
    lots = torch.Generator().manual_seed(0)
    x = torch.randn(120, 5, generator=lots)
    y = x @ torch.randn(5, generator=lots) + 0.1 * torch.randn(120, generator=lots)
    wrong = torch.rand(120, generator=lots) < 0.1
    y = torch.where(wrong, -y.sign() * (y.abs() + 1), y)
    w = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    gradients = (x @ w - y)[:, None] * x
    assert detection((gradients @ torch.linalg.inv(x.T @ x) * gradients).sum(1), wrong) > 0.9


def test_duplicates_are_found_whatever_the_size_of_their_scores() -> None:
    lots = torch.Generator().manual_seed(0)
    features = torch.randn(30, 16, generator=lots) * torch.logspace(-1, 1, 30)[:, None]
    features[7] = 5 * features[21]
    pairs, alike = duplicates(features @ features.T, 2)
    assert pairs[0].tolist() == [7, 21]
    assert alike[0] == pytest.approx(1.0, abs=1e-5)
    assert alike[1] < 0.95


def test_a_bootstrap_covers_the_mean_of_what_was_drawn() -> None:
    lots = torch.Generator().manual_seed(0)
    inside = 0
    for seed in range(60):
        found = bootstrap(1 + torch.randn(25, generator=lots), rng=seed)
        inside += found.low < 1 < found.high
    assert inside >= 52


def test_what_helped_is_missed_when_it_is_left_out() -> None:
    """Queries are means of training numbers; the model predicts the mean of what it has seen."""
    values = torch.cat([torch.zeros(10), torch.ones(10)])
    queries, asked = torch.tensor([0.0, 1.0]), []

    def retrain(kept, seed):
        asked.append((tuple(kept), seed))
        return (values[list(kept)].mean() - queries).square()

    helpful = -(values[None] - queries[:, None]).abs()
    found = leave_out({"helpful": top(helpful, 0.2), "harmful": top(-helpful, 0.2)}, retrain, 20, (0, 1))
    assert found.rise("helpful").low > 0 > found.rise("harmful").high
    assert found.rise("helpful", than="harmful").low > 0
    # A mean of 10 ones and 6 zeros is 0.625: asked for zero, 0.390625 in place of 0.25.
    assert found.rise("helpful").mean == pytest.approx((0.390625 - 0.25) / 0.25)
    assert len(asked) == len(set(asked))
    with pytest.raises(InputError, match="none or all"):
        top(helpful, 0.01)
    with pytest.raises(InputError, match="Nothing was left out"):
        found.rise("random")


def test_a_tail_patch_with_the_query_itself_helps_it_by_rate_times_its_squared_gradient() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 1, bias=False)
    task = module_task(net, {"loss": lambda call, b: (call(b["x"])[:, 0] - b["y"]).square()})
    examples = {"x": torch.randn(6, 4), "y": torch.randn(6)}
    queries = {"x": examples["x"][:2], "y": examples["y"][:2], "index": torch.arange(2)}
    itself = torch.eye(6)[:2]
    found = tail_patch(task, examples, queries, itself, rate=1e-4, k=1)
    residual = (queries["x"] @ net.weight[0] - queries["y"]).detach()
    wanted = 1e-4 * (2 * residual[:, None] * queries["x"]).square().sum(1)
    torch.testing.assert_close(found.values, wanted, rtol=2e-2, atol=1e-8)
    assert torch.equal(net.weight, task.module.weight)


def test_shapes_that_do_not_belong_together_are_named() -> None:
    given, subsets, losses = additive(0.1)
    with pytest.raises(InputError, match=r"ask for scores \[10, 60\]"):
        _check(given[:, :50], subsets, losses)
    with pytest.raises(InputError, match="must differ"):
        linear_datamodeling_score(given, subsets, losses * 0)
    with pytest.raises(InputError, match="2 to 10 folds"):
        choose_damping(lambda _: given, [1.0], subsets, losses, folds=1)
