"""The DAS table made small: what it says of trained and untrained directions, and that its runs are right."""

from __future__ import annotations

from collections import Counter

import pytest
import pyvene as pv
import torch

import mm_adapters as mm
from integrations import pyvene as mm_pv
from mm_adapters.zoo import world
from tests.quality import das_subspaces as subspaces
from tests.quality.das import pairs as batches_of_pairs
from tests.quality.das_questions import known
from tests.quality.das_subspaces import COMPONENTS, RANDOM, TRAINED, WHOLE, Draw, Effort, score
from tests.quality.das_tasks import COLOUR, OBJECT, pair, renamed

SMALL = Effort(steps=60, n_train=192, n_judge=64)


@pytest.fixture(scope="module")
def model() -> mm.HookedModel:
    return mm.load("tiny-llava", dtype=torch.float32)


@pytest.fixture(scope="module")
def objects(model: mm.HookedModel) -> Draw:
    return subspaces.draw(model, OBJECT, (32, 20), "test", 7)


def test_an_answer_counts_as_a_whole_as_greedy_generation_says_it(
    model: mm.HookedModel, objects: Draw
) -> None:
    asked = objects.judge
    assert any(" " in q.answer for q in asked.questions)
    written = model.wrapped.generate(**asked.prompts, max_new_tokens=4, do_sample=False)
    start = asked.prompts["input_ids"].shape[1]
    texts = asked.tokenizer.batch_decode(written[:, start:], skip_special_tokens=True)
    right = [text.strip() == q.answer for text, q in zip(texts, asked.questions, strict=True)]
    assert 0.5 < sum(right) / len(right) < 1
    assert known(model, asked).tolist() == right


def test_a_run_from_the_last_token_on_is_the_whole_run(model: mm.HookedModel, objects: Draw) -> None:
    pairs = pair(OBJECT.name, objects.judge, objects.judge_known, 8, 0)
    torch.manual_seed(0)
    moved = subspaces.intervenable(model, OBJECT, RANDOM)
    batch = pairs.batch(torch.arange(8))
    places = batch["unit_locations"]
    short = [moved(batch["base"], batch["sources"], places)[1].logits[:, 0].detach() for _ in range(2)]
    assert torch.equal(*short)  # A run leaves what was read as it was.
    whole, source = ({k: v[i] for k, v in pairs.asked.prompts.items()} for i in (pairs.base, pairs.source))
    last = torch.full((8,), whole["input_ids"].shape[1] - 1)
    logits = moved(whole, [source], mm_pv.units(last))[1].logits[:, -1].detach()
    torch.testing.assert_close(short[0], logits, rtol=1e-4, atol=1e-4)
    # What the interchange changes is far more than that.
    untouched = model.wrapped(**whole).logits[:, -1].detach()
    assert float((logits - untouched).abs().max()) > 0.1


def test_directions_that_are_given_are_those_that_move(model: mm.HookedModel, objects: Draw) -> None:
    moved = subspaces.intervenable(model, OBJECT, COMPONENTS)
    (one,) = moved.interventions.values()
    assert isinstance(one, pv.LowRankRotatedSpaceIntervention)
    found = subspaces.components(subspaces.last_states(model, OBJECT.site, objects.judge))[:, : OBJECT.rank]
    one.rotate_layer.weight = found
    generator = torch.Generator().manual_seed(0)
    base, source = torch.randn(2, 5, 1, len(found), generator=generator)
    want = base + (source - base) @ found @ found.T
    torch.testing.assert_close(one(base, source), want, rtol=1e-4, atol=1e-5)


def test_labels_are_the_second_object_of_the_base_and_controls_are_renamed(objects: Draw) -> None:
    names = renamed(OBJECT.name, 0)
    assert sorted(names) == sorted(names.values())
    assert all(name != other for name, other in names.items())
    questions = objects.train.questions
    for given in (None, names):
        pairs = pair(OBJECT.name, objects.train, objects.train_known, 64, 3, given)
        for b, s, label in zip(pairs.base.tolist(), pairs.source.tolist(), pairs.labels, strict=True):
            base, source = questions[b], questions[s]
            shape = source.variable if given is None else given[source.variable]
            answers = {
                q.answer for q in questions if (q.scene, q.kind, q.variable) == (base.scene, base.kind, shape)
            }
            assert answers == {label}
            assert base.kind != source.kind
            assert base.scene != source.scene
        shuffled = pairs.with_shuffled_labels(0)
        kinds = [questions[b].kind for b in pairs.base.tolist()]
        assert Counter(zip(kinds, shuffled.labels, strict=True)) == Counter(
            zip(kinds, pairs.labels, strict=True)
        )
        assert shuffled.labels != pairs.labels


def test_every_colour_s_token_is_the_one_its_answer_begins_with(model: mm.HookedModel) -> None:
    batches, first = batches_of_pairs(model, 24, "test", 8, 0)
    colours = list(world.COLOURS)
    spelled = [model.inputs.tokenizer(f" {c}", add_special_tokens=False).input_ids for c in colours]
    assert max(map(len, spelled)) > 1  # "purple" is two tokens: the first is compared with the next one said.
    assert first.tolist() == [ids[0] for ids in spelled]
    assert [len(b["targets"]) for b in batches] == [8, 8, 8]
    assert all(set(b["targets"][:, 0].tolist()) <= set(first.tolist()) for b in batches)


def test_trained_directions_move_which_object_is_asked_and_untrained_ones_do_not(
    model: mm.HookedModel, objects: Draw
) -> None:
    found = {
        row: score(model, OBJECT, row, objects, 0, SMALL) for row in (TRAINED, COMPONENTS, RANDOM, WHOLE)
    }
    assert found[TRAINED] > max(found[COMPONENTS], found[RANDOM]) + 0.3, found
    assert found[WHOLE] < 0.1, found


def test_principal_components_move_a_colour_and_random_directions_do_not(model: mm.HookedModel) -> None:
    colours = subspaces.draw(model, COLOUR, (96, 48), "test", 7)
    assert {q.answer for q in colours.judge.questions} >= {"purple"}
    found = {row: score(model, COLOUR, row, colours, 0, SMALL) for row in (COMPONENTS, RANDOM)}
    assert found[COMPONENTS] > found[RANDOM] + 0.5, found
