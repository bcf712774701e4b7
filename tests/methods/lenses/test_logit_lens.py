"""The logit lens: what each layer's state says, read by the model's own unembedding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import mm_adapters as mm
from methods_multimodal.lenses import LensReading, joined, logit_lens
from mm_adapters.traced import TracedModel
from tests.methods.contract.families import family


# Its layouts need a tokenizer, with which the contract's families come.
def seeing() -> tuple[tiny.Case, mm.HookedModel]:
    """A model that is given images, and its inputs."""
    return family("llava").case, family("llava").model("hooked")


ENGINES = {"hooked": mm.HookedModel, "nnsight": TracedModel}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["llava", "llava_siglip_qwen", "llava_mistral", "opt_lm"])
def test_the_last_layers_logits_are_the_models_own_to_the_last_bit(name: str, engine: str) -> None:
    built = tiny.CASES[name]()
    own = built.model(**built.inputs).logits.detach()
    model = ENGINES[engine](built.model)
    assert torch.equal(logit_lens(model, built.inputs, final_norm=True).scores[:, -1], own[:, -1])
    every = list(range(own.shape[1]))
    found = logit_lens(model, built.inputs, final_norm=True, position=every)
    assert torch.equal(found.scores[:, -1], own.flatten(0, 1))
    assert found.own_gap == 0.0


def test_image_tokens_are_read_where_the_layout_has_them() -> None:
    built, model = seeing()
    found = logit_lens(model, built.inputs, final_norm=True, position="image", tokens=[3, 9])
    ids = built.inputs["input_ids"]
    expected = (ids == built.model.config.image_token_id).nonzero().tolist()
    assert [list(pair) for pair in zip(found.rows, found.positions, strict=True)] == expected
    with torch.no_grad():
        states = built.model(**built.inputs, output_hidden_states=True).hidden_states
        logits = built.model.lm_head(built.model.model.language_model.norm(states[1]))
    rows, columns = torch.tensor(expected).T
    torch.testing.assert_close(found.scores[:, 1], logits[rows, columns][:, [3, 9]])
    torch.testing.assert_close(found.probabilities[:, 1], logits.softmax(-1)[rows, columns][:, [3, 9]])
    assert found.grid is not None
    drawn = found.mini_map(1, layer=1, row=1)
    patches = [p for p, r in zip(found.patches, found.rows, strict=True) if r == 1]
    own = [i for i, r in enumerate(found.rows) if r == 1]
    for entry, patch in zip(own, patches, strict=True):
        assert patch is not None
        assert drawn[patch] == found.probabilities[entry, 1, 1]


def test_readings_are_split_by_row_and_joined_again() -> None:
    built, model = seeing()
    found = logit_lens(model, built.inputs, final_norm=True, position="image")
    again = joined([found.of_row(0), replace(found.of_row(1), rows=(0,) * (len(found.rows) // 2))])
    assert torch.equal(again.scores, found.scores)
    assert (again.rows, again.positions, again.patches) == (found.rows, found.positions, found.patches)
    assert found.entry(1, found.positions[-1]) == len(found.rows) - 1
    with pytest.raises(mm.InputError, match="There is nothing of row 2: rows are"):
        found.of_row(2)
    with pytest.raises(mm.InputError, match="cannot be joined"):
        joined([found, logit_lens(model, built.inputs, final_norm=False)])


def test_a_reading_is_saved_whole(tmp_path: Path) -> None:
    built, model = seeing()
    found = logit_lens(model, built.inputs, final_norm=True, position="image")
    again = LensReading.load(found.save(tmp_path / "lens.safetensors"))
    assert torch.equal(again.scores, found.scores)
    assert again.total is not None
    assert found.total is not None
    assert torch.equal(again.total, found.total)
    for name in ("lens", "layers", "rows", "positions", "patches", "grid", "where", "own_gap"):
        assert getattr(again, name) == getattr(found, name)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"position": "latent"}, r"layout has no 'latent' role: its positions are"),
        ({"position": "nose"}, "No role 'nose'"),
        ({"position": []}, "no position to read"),
        ({"position": 99}, "99"),
        ({"tokens": [7000]}, "There is no token 7000: the vocabulary has 0 to"),
        ({"tokens": []}, "give the ids to keep"),
    ],
)
def test_what_cannot_be_read_is_refused_before_it_runs(options: dict[str, Any], reason: str) -> None:
    built, model = seeing()
    handles = [
        module.register_forward_pre_hook(lambda *_: pytest.fail("The model ran."))
        for module in built.model.modules()
    ]
    with pytest.raises((mm.MissingSiteError, mm.InputError), match=reason):
        logit_lens(model, built.inputs, final_norm=True, **options)
    for handle in handles:
        handle.remove()


def test_each_layers_logits_are_its_hidden_state_unembedded() -> None:
    built = tiny.llava()
    model = mm.HookedModel(built.model)
    with torch.no_grad():
        states = built.model(**built.inputs, output_hidden_states=True).hidden_states
        language, head = built.model.model.language_model, built.model.lm_head
        normed = logit_lens(model, built.inputs, final_norm=True)
        plain = logit_lens(model, built.inputs, final_norm=False)
        for layer in range(3):  # transformers norms the last one itself.
            torch.testing.assert_close(normed.scores[:, layer], head(language.norm(states[layer][:, -1])))
            torch.testing.assert_close(plain.scores[:, layer], head(states[layer][:, -1]))


def test_top_tokens_are_sorted_by_probability() -> None:
    built = tiny.llava()
    found = logit_lens(mm.HookedModel(built.model), built.inputs, final_norm=True)
    likely, ids = found.top(4, entry=1)
    assert bool((likely.diff(dim=-1) <= 0).all())
    torch.testing.assert_close(found.scores[1].softmax(-1).gather(-1, ids), likely)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama", "no unembedding: it is a language tower without a head of words"),
        ("blip_2_t5", r"language.blocks.0.hook_resid_pre is out of reach: it has an encoder and a decoder"),
        ("florence2", r"language.ln_final.hook_scale is out of reach: each block normalises"),
        ("clip", "no site 'language'"),
    ],
)
def test_a_tower_without_a_stream_of_words_is_refused_before_it_runs(name: str, reason: str) -> None:
    built = tiny.CASES[name]()
    for module in built.model.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("The model ran."))
    with pytest.raises(mm.MissingSiteError, match=reason):
        logit_lens(mm.HookedModel(built.model), built.inputs, final_norm=True)
