"""The fitted probes against the objective that they minimise, and the labels of the controls."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

import mm_adapters as mm
from methods_multimodal.probing import Labels, Probe, fit_probe, split_rows

RNG = np.random.default_rng(1)
ROWS = torch.from_numpy(RNG.standard_normal((150, 6)) * [1, 2, 3, 1, 1, 50] + 7).float()
IDS = (ROWS[:, 0] + 0.5 * ROWS[:, 1] + torch.from_numpy(RNG.standard_normal(150)) > 10.5).long().numpy() + (
    ROWS[:, 2] > 8
).long().numpy()
TRAIN, VALIDATION = torch.arange(100), torch.arange(100, 150)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_linear_probe_minimises_the_penalised_loss(n_classes: int) -> None:
    ids = np.minimum(IDS, n_classes - 1)
    probe = fit_probe(ROWS, ids, train=TRAIN, strengths=[0.1])
    x = ROWS[TRAIN].double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    weight = torch.zeros(6, n_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n_classes, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )
    # Of two classes scikit-learn has one vector, the difference of ours, and so half of our penalty.
    penalty = 1 / (2 * 0.1) * (1 if n_classes > 2 else 2)

    def loss() -> torch.Tensor:
        search.zero_grad()
        fits = torch.nn.functional.cross_entropy(
            x @ weight + bias, torch.from_numpy(ids[:100]), reduction="sum"
        )
        total = fits + penalty * weight.square().sum()
        total.backward()
        return total

    search.step(loss)
    slow = (x @ weight + bias).softmax(1).detach()
    torch.testing.assert_close(probe.logits(ROWS[TRAIN]).softmax(1), slow, atol=5e-3, rtol=0)


def test_directions_are_the_gradients_of_the_logits() -> None:
    probe = fit_probe(ROWS, IDS, train=TRAIN, strengths=[0.1])
    rows = ROWS.double().requires_grad_()
    for klass in range(3):
        (gradient,) = torch.autograd.grad(probe.logits(rows)[:, klass].sum(), rows)
        torch.testing.assert_close(gradient, probe.directions[klass].expand_as(rows))
    mlp = fit_probe(ROWS, IDS, train=TRAIN, strengths=[0.1], head="mlp")
    with pytest.raises(mm.InputError, match="MLP"):
        mlp.directions  # noqa: B018


def test_the_strength_is_the_best_on_the_validation_rows_and_of_equals_the_weakest() -> None:
    strengths = (1e-4, 1e-2, 1.0, 10.0)
    one_by_one = [fit_probe(ROWS, IDS, train=TRAIN, strengths=[s]) for s in strengths]
    right = [float((p.predict(ROWS[VALIDATION]).numpy() == IDS[100:]).mean()) for p in one_by_one]
    chosen = fit_probe(ROWS, IDS, train=TRAIN, validation=VALIDATION, strengths=strengths)
    assert chosen.validation == max(right)
    assert chosen.strength == strengths[right.index(max(right))]


def test_an_mlp_finds_what_no_linear_probe_can() -> None:
    signs = torch.from_numpy(RNG.choice([-1.0, 1.0], (300, 4))).float()
    xor = (signs[:, 0] * signs[:, 1] > 0).long().numpy()
    known: dict[str, Any] = {"train": torch.arange(200), "validation": torch.arange(200, 250)}
    right = {
        head: float(
            (fit_probe(signs, xor, head=head, **known).predict(signs[250:]).numpy() == xor[250:]).mean()
        )
        for head in ("linear", "mlp")
    }
    assert right["mlp"] == 1.0
    assert right["linear"] < 0.75


def test_a_class_that_training_lacks_is_never_chosen() -> None:
    ids = np.where(np.arange(150) < 100, IDS % 2, 2)
    probe = fit_probe(ROWS, ids, train=TRAIN, strengths=[0.1], n_classes=4)
    assert set(probe.predict(ROWS).tolist()) <= {0, 1}
    assert bool(torch.isfinite(probe.logits(ROWS)).all())


def test_rows_that_are_not_finite_are_refused() -> None:
    with pytest.raises(mm.InputError, match="NaN"):
        fit_probe(ROWS / 0, IDS, train=TRAIN, strengths=[1.0])


def test_a_control_task_is_a_function_of_the_type_drawn_like_the_labels() -> None:
    n = 6000
    values = RNG.choice(list("aabc"), n)
    types = [f"type {i}" for i in RNG.integers(2000, size=n)]
    variable = Labels.of("letter", values, split_rows(n))
    ids = variable.control(types, seed=0)
    by_type: dict[str, set[int]] = {}
    for kind, label in zip(types, ids.tolist(), strict=True):
        by_type.setdefault(kind, set()).add(label)
    assert all(len(labels) == 1 for labels in by_type.values())
    shares = Counter(next(iter(labels)) for labels in by_type.values())
    assert [shares[i] / len(by_type) for i in range(3)] == pytest.approx([0.5, 0.25, 0.25], abs=0.04)
    order = RNG.permutation(n)
    moved = Labels.of("letter", values[order], split_rows(n))
    assert moved.classes == variable.classes == ("a", "b", "c")
    shuffled = variable.shuffled(0)
    assert sorted(shuffled) == sorted(variable.ids)
    assert np.mean(shuffled == variable.ids) == pytest.approx(0.375, abs=0.03)


def test_a_probe_comes_back_as_it_was_saved(tmp_path) -> None:
    probe = fit_probe(ROWS, IDS, train=TRAIN, validation=VALIDATION)
    back = Probe.load(probe.save(tmp_path / "probe.safetensors"))
    assert torch.equal(back.logits(ROWS), probe.logits(ROWS))
