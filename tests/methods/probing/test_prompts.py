"""Prompt probes against the model's own scores of single pictures, and on what the zoo knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mm_adapters as mm
from methods_multimodal.probing import PromptProbe, prompt_probe
from mm_adapters.zoo import measures, world

SCENES = [world.scene(i, "validation", kind="one") for i in range(16)]
PICTURES = measures.images_of(SCENES)
COLOURS = [scene.things[0].colour for scene in SCENES]
QUESTION = "<image>\nquestion: what colour is the object? answer:"


def test_of_a_contrastive_model_scores_are_mean_cosines() -> None:
    model = mm.load("tiny-clip")
    templates = ["a photo of a {} object", "a {} thing"]
    found = prompt_probe(model, PICTURES, COLOURS, templates, batch=5)
    for k, value in enumerate(found.values[:3]):
        texts = [template.format(value) for template in templates]
        output = model.run({"images": PICTURES[:2], "text": texts}).output
        cosines = output.logits_per_image / model.wrapped.logit_scale.exp()
        torch.testing.assert_close(found.scores[:2, k], cosines.mean(1).detach(), atol=1e-5, rtol=0)
    assert found.accuracy > 0.9 > found.interval()[0] > 0.5
    assert 0 < found.shuffled_accuracy < 0.35


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_of_a_vlm_scores_are_log_probabilities_of_whole_answers(engine: str) -> None:
    model: Any = mm.load("tiny-llava", engine=engine)
    questions = [QUESTION, "<image>\nquestion: what colour? answer:"] * 8
    found = prompt_probe(model, PICTURES, COLOURS, questions, batch=16)
    tokenizer = model.tokenizer_of("language")
    n_tokens = set()
    for row in (0, 1):
        for value in ("purple", "red"):
            prompt = model.prepare(images=[PICTURES[row]], text=[questions[row]])
            answer = tokenizer(f" {value}", add_special_tokens=False)["input_ids"]
            n_tokens.add(len(answer))
            total, ids = 0.0, prompt["input_ids"]
            for token in answer:
                inputs = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
                total += float(model.run(inputs).output.logits[0, -1].log_softmax(0)[token])
                ids = torch.cat([ids, torch.tensor([[token]])], 1)
            k = found.values.index(value)
            assert float(found.scores[row, k]) == pytest.approx(total, abs=1e-3)
    assert n_tokens == {1, 2}
    assert found.accuracy > 0.8


def test_chance_is_the_mean_over_all_ways_to_deal_the_labels_out(tmp_path: Path) -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    record = PromptProbe(scores, torch.tensor([0, 1, 1, 2]), ("a", "b", "c"), "cosine")
    orders = [torch.randperm(4) for _ in range(4000)]
    dealt = [float((scores.argmax(1) == record.truth[order]).double().mean()) for order in orders]
    assert record.shuffled_accuracy == pytest.approx(sum(dealt) / len(dealt), abs=0.02)
    assert record.confusion.tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]]
    assert torch.equal(record.calibrated.scores.mean(0), torch.zeros(3))
    back = PromptProbe.load(record.save(tmp_path / "prompts.safetensors"))
    assert torch.equal(back.right, record.right)


def test_what_was_asked_before_a_kill_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mm.load("tiny-clip")
    whole = prompt_probe(model, PICTURES, COLOURS, "a {} object", batch=8, folder=tmp_path / "work")
    monkeypatch.setattr(type(model), "run", lambda *args, **options: pytest.fail("it ran"))
    again = prompt_probe(model, PICTURES, COLOURS, "a {} object", batch=8, folder=tmp_path / "work")
    assert torch.equal(again.scores, whole.scores)


@pytest.mark.parametrize(
    ("name", "call", "error", "match"),
    [
        ("tiny-clip", {"prompts": "a colour"}, mm.InputError, "templates"),
        ("tiny-clip", {"labels": COLOURS[1:]}, mm.InputError, "15 labels for 16 images"),
        ("tiny-clip", {"values": ["red", "blue"]}, mm.InputError, "is none of them"),
        ("tiny-llava", {"prompts": [QUESTION] * 3}, mm.InputError, "3 questions for 16 images"),
        ("tiny-sd", {}, mm.MissingSiteError, "no tower 'language'"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    name: str, call: dict[str, Any], error: type[Exception], match: str
) -> None:
    asked: dict[str, Any] = {"images": PICTURES, "labels": COLOURS, "prompts": "a {} object", **call}
    with pytest.raises(error, match=match):
        prompt_probe(mm.load(name), **asked)
