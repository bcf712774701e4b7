"""Lenses that are trained: they find a planted map, begin as the untrained lens, and resume after a kill."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.lenses import (
    TunedLens,
    attention_lens,
    logit_lens,
    train_attention_lens,
    train_tuned_lens,
    tuned_lens,
)
from methods_multimodal.lenses import _training as training
from mm_adapters.traced import TracedModel


def parts(built: tiny.Case) -> tuple[list[Any], list[Any], list[Any]]:
    """Training, validation and test batches, none alike."""
    rng = torch.Generator().manual_seed(3)
    ids = built.inputs["input_ids"]
    image = ids == built.model.config.image_token_id

    def batch() -> dict[str, Any]:
        words = torch.randint(5, 60, ids.shape, generator=rng)
        return {**built.inputs, "input_ids": torch.where(image, ids, words)}

    return [batch(), batch()], [batch()], [batch()]


def train(model: Any, sets: Any, **options: Any) -> TunedLens:
    return train_tuned_lens(
        model, *sets, **{"n_steps": 3, "rates": (1e-2, 1e-3), "position": [-1, -3], **options}
    )


def test_adam_is_torchs() -> None:
    goal = torch.tensor([1.0, -2.0, 0.5])
    batches: list[Mapping[str, Any]] = [{"x": torch.tensor(1.0)}, {"x": torch.tensor(-0.5)}]
    loss: Any = lambda batch: lambda maps: (maps["w"] - batch["x"] * goal).square().sum()[None]  # noqa: E731
    done = training.train(batches, loss, {"w": torch.zeros(3)}, rates=(0.1, 0.02), n_steps=6, file=None)
    for rate, found in zip((0.1, 0.02), done, strict=True):
        w = torch.zeros(3, requires_grad=True)
        adam = torch.optim.Adam([w], lr=rate)
        for i in range(6):
            adam.param_groups[0]["lr"] = rate * (1 - i / 6)
            adam.zero_grad()
            loss(batches[i % 2])({"w": w}).sum().backward()
            adam.step()
        torch.testing.assert_close(found["w"], w.detach())


def test_a_planted_map_is_found() -> None:
    rng = torch.Generator().manual_seed(0)
    planted, unembed = torch.randn(6, 6, generator=rng) / 3, torch.randn(6, 9, generator=rng)
    states = [torch.randn(64, 1, 6, generator=rng) for _ in range(5)]

    def losses(batch: Mapping[str, Tensor]) -> Any:
        h = batch["h"]
        own = ((h + h @ planted) @ unembed)[:, 0]
        return lambda maps: training.kl(own, (h + h @ maps["a"]) @ unembed).mean(0)

    (found,) = training.train(
        [{"h": h} for h in states[:4]],
        losses,
        {"a": torch.zeros(6, 6)},
        rates=(0.03,),
        n_steps=300,
        file=None,
    )
    before, after = (float(losses({"h": states[4]})({"a": a})) for a in (torch.zeros(6, 6), found["a"]))
    assert before > 0.3
    assert after < 0.01 * before


def test_the_divergences_are_those_of_distributions_written_out() -> None:
    built = tiny.llava()
    model = mm.HookedModel(built.model)
    sets = parts(built)
    lens = train(model, sets, position=-1)
    reading = tuned_lens(model, sets[2][0], lens)
    plain = logit_lens(model, sets[2][0], final_norm=True)
    for found, stored in ((reading, lens.kl), (plain, lens.logit_kl)):
        p = found.probabilities.double()
        for row in range(2):
            for layer in range(stored.shape[1]):
                own, said = p[row, -1], p[row, layer]
                by_hand = float((own * (own / said).log()).sum())
                assert float(stored[row, layer]) == pytest.approx(by_hand, abs=2e-5)
    mean = torch.stack([logit_lens(model, b, final_norm=True).probabilities[:, -1].mean(0) for b in sets[0]])
    own = plain.probabilities[:, -1]
    flat = (own * (own / mean.mean(0)).log()).sum(-1)
    torch.testing.assert_close(lens.constant_kl, flat, atol=1e-5, rtol=1e-4)


def test_an_untrained_lens_is_the_logit_lens_and_the_last_layer_the_models_own() -> None:
    built = tiny.llava()
    model = mm.HookedModel(built.model)
    lens = train(model, parts(built), n_steps=1, rates=(1e-12,))
    found, plain = (
        tuned_lens(model, built.inputs, lens, position=[-1, 2]),
        logit_lens(model, built.inputs, final_norm=True, position=[-1, 2]),
    )
    torch.testing.assert_close(found.scores, plain.scores)
    assert torch.equal(found.scores[:, -1], plain.scores[:, -1])
    torch.testing.assert_close(lens.kl, lens.logit_kl)


@pytest.mark.parametrize("kind", ["tuned", "attention"])
def test_a_training_that_was_killed_ends_as_one_that_was_not(kind: str, tmp_path: Path) -> None:
    built = tiny.llava()
    model = mm.HookedModel(built.model)
    sets = parts(built)

    def run(folder: Path | None) -> Any:
        if kind == "tuned":
            return train(model, sets, folder=folder)
        return train_attention_lens(model, 0, *sets, n_steps=3, rates=(1e-2,), folder=folder)

    whole = run(None)
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == (2 if kind == "tuned" else 4):
            raise KeyboardInterrupt

    handle = built.model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    handle.remove()
    again = run(tmp_path)
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.kl, whole.kl)
    with pytest.raises(mm.StoreError, match="holds work of something else: "):
        train(model, sets, folder=tmp_path, n_steps=4)


def test_a_lens_is_refused_for_other_weights(tmp_path: Path) -> None:
    built = tiny.llava()
    model = mm.HookedModel(built.model)
    lens = train(model, parts(built))
    again = TunedLens.load(lens.save(tmp_path / "lens.safetensors"))
    assert torch.equal(
        tuned_lens(model, built.inputs, again).scores, tuned_lens(model, built.inputs, lens).scores
    )
    with torch.no_grad():
        built.model.model.language_model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(mm.InputError, match="tuned lens was made for other weights"):
        tuned_lens(model, built.inputs, again)


def test_a_heads_map_begins_as_what_it_writes_read_by_the_unembedding() -> None:
    built = tiny.llava()
    model = mm.HookedModel(built.model)
    lens = train_attention_lens(model, 1, *parts(built), n_steps=1, rates=(1e-12,))
    reading = attention_lens(model, built.inputs, lens)
    assert reading.layers == tuple(f"layer 1 head {i}" for i in range(len(reading.layers)))
    run = model.run(built.inputs, read=["language.blocks.1.attn.hook_z"])
    z = run["language.blocks.1.attn.hook_z"][:, -1]
    attention = built.model.model.language_model.layers[1].self_attn
    gain, head = built.model.model.language_model.norm.weight, built.model.lm_head
    for h in range(z.shape[1]):
        alone = torch.zeros_like(z)
        alone[:, h] = z[:, h]
        written = head(attention.o_proj(alone.flatten(1)) * gain) + lens.bias[h]
        torch.testing.assert_close(reading.scores[:, h], written.detach(), atol=1e-5, rtol=1e-4)


def test_both_engines_train_the_same_lens() -> None:
    lenses = []
    for engine in (mm.HookedModel, TracedModel):
        built = tiny.llava()
        model: Any = engine(built.model)
        lens = train(model, parts(built))
        lenses.append((lens.weight, lens.kl, tuned_lens(model, built.inputs, lens).scores))
    for one, other in zip(*lenses, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"rates": ()}, "learning rates above 0"), ({"n_steps": 0}, "n_steps=0"), ({"position": 99}, "99")],
)
def test_bad_settings_are_refused_before_it_runs(options: dict[str, Any], reason: str) -> None:
    built = tiny.llava()
    for module in built.model.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("The model ran."))
    with pytest.raises((mm.InputError, mm.MissingSiteError), match=reason):
        train(mm.HookedModel(built.model), parts(built), **options)
    with pytest.raises(mm.InputError, match="no validation batches"):
        train(mm.HookedModel(built.model), (parts(built)[0], [], []))
