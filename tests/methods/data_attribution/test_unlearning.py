"""Unlearning against its formula written out, on a model small enough for that."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from methods_multimodal.data_attribution import module_task
from methods_multimodal.data_attribution.task import Batch, Task
from methods_multimodal.data_attribution.unlearning import fisher_diagonal, unlearning_scores
from mm_adapters import InputError, StoreError


def subject() -> tuple:
    torch.manual_seed(0)
    net = torch.nn.Linear(5, 1)
    task = module_task(net, {"loss": lambda call, b: (call(b["x"])[:, 0] - b["y"]).square()})
    examples = {"x": torch.randn(12, 5), "y": torch.randn(12)}
    queries = {"x": torch.randn(3, 5), "y": torch.randn(3), "index": torch.arange(3)}
    return net, task, examples, queries


def test_the_fisher_information_is_the_mean_of_squared_gradients_of_a_loop() -> None:
    net, task, examples, _ = subject()
    found = fisher_diagonal(task, examples, batch_size=5, max_rows=3)
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for x, y in zip(examples["x"], examples["y"], strict=True):
        net.zero_grad()
        (net(x)[0] - y).square().backward()
        for name, p in net.named_parameters():
            assert p.grad is not None
            total[name] += p.grad.square() / 12
    for name, value in total.items():
        torch.testing.assert_close(found[name], value)


def test_a_score_is_how_much_an_examples_loss_rises_after_the_step() -> None:
    net, task, examples, queries = subject()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    found = unlearning_scores(task, examples, queries, step=0.05, damping=0.2, batch_size=5)
    fisher = fisher_diagonal(task, examples)
    mean = torch.cat([v.flatten() for v in fisher.values()]).mean()

    def losses(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (examples["x"] @ w[0] + b - examples["y"]).square()

    for query in range(3):
        x, y = queries["x"][query], queries["y"][query]
        residual = (x @ net.weight[0] + net.bias - y).detach()
        w = net.weight + 0.05 * 2 * residual * x / (12 * (fisher["weight"] + 0.2 * mean))
        b = net.bias + 0.05 * 2 * residual / (12 * (fisher["bias"] + 0.2 * mean))
        wanted = (losses(w, b) - losses(net.weight, net.bias)).detach()
        torch.testing.assert_close(found[query], wanted, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_after_a_small_step_a_score_is_the_product_of_gradients_over_the_fisher_information() -> None:
    """Half the step halves the scores; after a large one every loss rises, whatever was unlearned."""
    net, task, examples, queries = subject()
    fisher = fisher_diagonal(task, examples)
    mean = torch.cat([v.flatten() for v in fisher.values()]).mean()
    scale = torch.cat([(v + 0.2 * mean).flatten() for v in fisher.values()]) * 12

    def gradients(of: dict) -> torch.Tensor:
        residual = 2 * (net(of["x"])[:, 0] - of["y"]).detach()
        return residual[:, None] * torch.cat([of["x"], torch.ones(len(of["x"]), 1)], 1)

    wanted = gradients(queries) / scale @ gradients(examples).T
    found = unlearning_scores(task, examples, queries, step=1e-3, damping=0.2) / 1e-3
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))
    assert 0.2 < float((wanted > 0).float().mean()) < 0.9
    assert bool((unlearning_scores(task, examples, queries, step=1e4, damping=0.2) > 0).all())


def test_the_query_itself_is_forgotten_most() -> None:
    _, task, examples, _ = subject()
    queries = {**examples, "index": torch.arange(12)}
    found = unlearning_scores(task, examples, queries)
    large = found.diagonal() > found.diagonal().median()
    assert torch.equal(found.argmax(1)[large], torch.arange(12)[large])


@pytest.mark.parametrize("stop", [1, 4, 7, 12, 20, 25])
def test_what_is_done_is_not_done_again_and_the_end_is_the_same(tmp_path: Path, stop: int) -> None:
    _, task, examples, queries = subject()
    calls: list[int] = []

    def watched(stop: int) -> Task:
        def rows(batch: Batch, draws: range) -> Batch:
            calls.append(len(batch["index"]))
            if len(calls) == stop:
                raise KeyboardInterrupt
            return task.rows(batch, draws)

        return dataclasses.replace(task, rows=rows)

    whole = unlearning_scores(watched(-1), examples, queries, batch_size=2)
    assert sum(calls) == 12 + 12 + 3 * (12 + 1)  # Fisher, before, and of each query a gradient and all.
    calls.clear()
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        unlearning_scores(watched(stop), examples, queries, batch_size=2, folder=folder)
    first = sum(calls)
    calls.clear()
    again = unlearning_scores(watched(-1), examples, queries, batch_size=2, folder=folder)
    assert torch.equal(again, whole)
    # The batch that was stopped (the Fisher's is all twelve), and each query's one gradient.
    assert first + sum(calls) <= 63 + (12 if stop == 1 else 2) + 3
    with pytest.raises(StoreError, match=r"settings\.step differ"):
        unlearning_scores(task, examples, queries, step=0.5, batch_size=2, folder=folder)


def test_the_step_of_each_example_is_the_papers_unless_it_is_given() -> None:
    _, task, examples, queries = subject()
    found = unlearning_scores(task, examples, queries)
    torch.testing.assert_close(found, unlearning_scores(task, examples, queries, step=0.01 * 12 / 118_000))


def test_a_step_that_goes_nowhere_is_refused() -> None:
    _, task, examples, queries = subject()
    with pytest.raises(InputError, match="positive"):
        unlearning_scores(task, examples, queries, step=0.0)
