"""A small part of `python -m tests.quality.neurons`: named neurons cost more than as strong others."""

from __future__ import annotations

import pytest
import torch

import mm_adapters as mm
from methods_multimodal.neurons import ablate_neurons, attribute_neurons
from tests.quality import neurons as quality
from tests.quality.asked import asked, roles


@pytest.fixture(scope="module")
def model() -> mm.HookedModel:
    return mm.load("tiny-llava")


def test_neurons_named_on_other_questions_cost_more_than_their_controls(model: mm.HookedModel) -> None:
    chosen_on = asked("colour", 24, "validation", things="two", seed=4)
    some = asked("colour", 24, "test", things="two", seed=4)
    metric = {"answer": quality.of_asked(model, chosen_on)}
    masks = {"last": roles(model, chosen_on)["last"]}
    named = attribute_neurons(model, chosen_on.inputs(), metric, masks, method="gradient").top(20)
    found = ablate_neurons(
        model,
        some.inputs(),
        quality.of_asked(model, some),
        named,
        where=roles(model, some)["last"],
        n_controls=3,
    )
    assert found.above_control().high < 0
    assert found.above_control("turned").high < 0
    assert 0.7 < found.norm / float(found.control_norm.mean()) < 1.5


def test_log_odds_are_of_the_right_first_token(model: mm.HookedModel) -> None:
    some = asked("colour", 4, "test", seed=4)
    output = model.run(some.inputs()).output
    odds = quality.of_asked(model, some)(output)
    last = model.row_positions(some.inputs())
    probabilities = output.logits[torch.arange(4), last].double().softmax(-1)
    tokens = torch.tensor(quality.first_tokens(model, [q.answer for q in some.questions]))
    right = probabilities.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(odds.double(), (right / (1 - right)).log(), rtol=1e-3, atol=1e-3)
