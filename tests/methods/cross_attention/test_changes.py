"""Which pixels change when a word is blocked: against runs of their own, and on a planted reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import mm_adapters as mm
from methods_multimodal.cross_attention import (
    Case,
    WordChanges,
    baseline_agreement,
    rank_agreement,
    word_changes,
)
from methods_multimodal.cross_attention.agreement import function_words
from methods_multimodal.cross_attention.generation import generate_checked
from methods_multimodal.cross_attention.tracing import knockout_edits

OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 24, "guidance_scale": 3.0}
PROMPT = "a big cat"


def model() -> mm.HookedModel:
    return mm.HookedModel(tiny.stable_diffusion().model)


@pytest.mark.parametrize("batch", [2, 3, 16])
def test_each_map_is_the_difference_to_a_run_with_that_word_blocked(batch: int) -> None:
    found = word_changes(model(), PROMPT, seed=1, batch=batch, options=OPTIONS)
    assert found.words == ("a", "big", "cat")
    for i, word in enumerate(found.words):
        lens = model()
        changes = knockout_edits(lens, Case(PROMPT, word), 1)
        plain, blocked = generate_checked(lens, [PROMPT] * 2, 1, changes, OPTIONS)
        torch.testing.assert_close(found.picture, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.blocked[i], blocked, rtol=1e-4, atol=1e-5)
        change = ((blocked - plain) ** 2).mean(0).sqrt()
        torch.testing.assert_close(found.of(word), change, rtol=1e-3, atol=1e-5)
        assert change.max() > 1e-4


def test_a_phrase_is_blocked_whole_and_pixels_alone_change_less() -> None:
    lens = model()
    both = word_changes(lens, PROMPT, ["big cat", "big", "cat"], options=OPTIONS)
    assert both.words == ("big cat", "big", "cat")
    alone = word_changes(lens, PROMPT, ["big"], text=False, options=OPTIONS)
    assert (both.text, alone.text) == (True, False)
    assert not torch.allclose(alone.of("big"), both.of("big"), atol=1e-6)


def test_a_denoiser_that_reads_no_words_changes_nowhere() -> None:
    built = tiny.stable_diffusion()
    for name, module in built.model.unet.named_modules():
        if name.endswith("attn2.to_out.0"):
            with torch.no_grad():
                module.weight.zero_()
    found = word_changes(mm.HookedModel(built.model), PROMPT, options=OPTIONS)
    assert found.changed.max() < 1e-6


def test_mistakes_are_refused_before_anything_runs() -> None:
    built = tiny.stable_diffusion()
    lens = mm.HookedModel(built.model)
    built.model.unet.forward = lambda *a, **k: pytest.fail("it ran")
    with pytest.raises(mm.WordNotFoundError, match="a, big, cat"):
        word_changes(lens, PROMPT, ["big", "dog"], options=OPTIONS)
    with pytest.raises(mm.InputError, match="batch=1"):
        word_changes(lens, PROMPT, batch=1, options=OPTIONS)
    with pytest.raises(mm.InputError, match="seed"):
        word_changes(lens, PROMPT, options=OPTIONS | {"seed": 1})
    with pytest.raises(mm.InputError, match="no words"):
        word_changes(lens, PROMPT, [], options=OPTIONS)


def test_what_was_drawn_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = word_changes(model(), PROMPT, batch=2, options=OPTIONS, folder=tmp_path / "work")
    built = tiny.stable_diffusion()
    monkeypatch.setattr(built.model.unet, "forward", lambda *a, **k: pytest.fail("it ran"))
    again = word_changes(
        mm.HookedModel(built.model), PROMPT, batch=2, options=OPTIONS, folder=tmp_path / "work"
    )
    assert torch.equal(first.changed, again.changed)
    first.save(tmp_path / "changes.safetensors")
    loaded = WordChanges.load(tmp_path / "changes.safetensors")
    assert loaded.words == first.words
    assert torch.equal(loaded.blocked, first.blocked)


def test_rank_agreement_is_of_the_order_of_pixels() -> None:
    ramp = torch.arange(16.0).view(4, 4)
    maps = torch.stack([ramp, -ramp, ramp**3, torch.ones(4, 4)])
    assert rank_agreement(maps[:3], ramp.exp().expand(3, -1, -1)).tolist() == pytest.approx([1, -1, 1])
    assert rank_agreement(maps[3:], ramp[None]).isnan().all()
    # A map of half the size is stretched to the change's.
    assert rank_agreement(ramp[None, ::2, ::2], ramp[None])[0] > 0.9


def test_a_map_is_compared_with_the_function_words_other_than_itself() -> None:
    left, top = torch.arange(5.0).expand(5, 5), torch.arange(5.0).expand(5, 5).mT
    names = ("A", "cat", "in", "hat")
    maps = torch.stack([left, -left, 3 * left + 1, top])
    values, others = baseline_agreement(maps, names)
    assert others == (("in",), ("A", "in"), ("A",), ("A", "in"))
    assert values.tolist() == pytest.approx([1, -1, 1, 0], abs=1e-6)
    # Without function words the mean of the other words is the baseline.
    values, others = baseline_agreement(maps[[2, 3, 0]], ("cat", "hat", "dog"))
    assert others == (("hat", "dog"), ("cat", "dog"), ("cat", "hat"))
    assert values[1] == pytest.approx(0, abs=1e-6)
    values, others = baseline_agreement(maps[:1], ("cat",))
    assert others == ((),)
    assert values.isnan().all()
    assert function_words(("The", "cat", "on")) == [0, 2]
