"""The logit lens: what each layer's state says, read by the model's own unembedding."""

from __future__ import annotations

import pytest
import tiny
import torch

import mm_adapters as mm
from methods_multimodal.lenses.logit_lens import logit_lens


@pytest.mark.parametrize("name", ["llava", "llava_siglip_qwen", "llava_mistral"])
def test_the_last_layers_logits_are_the_models_own(name: str) -> None:
    built = tiny.CASES[name]()
    found = logit_lens(mm.HookedModel(built.model), built.inputs, final_norm=True)
    own = built.model(**built.inputs).logits[:, -1].detach()
    torch.testing.assert_close(found.logits[:, -1], own, rtol=1e-5, atol=1e-6)


def test_each_layers_logits_are_its_hidden_state_unembedded() -> None:
    built = tiny.llava()
    model = mm.HookedModel(built.model)
    with torch.no_grad():
        states = built.model(**built.inputs, output_hidden_states=True).hidden_states
        language, head = built.model.model.language_model, built.model.lm_head
        normed = logit_lens(model, built.inputs, final_norm=True)
        plain = logit_lens(model, built.inputs, final_norm=False)
        for layer in range(3):  # transformers norms the last one itself.
            torch.testing.assert_close(normed.logits[:, layer], head(language.norm(states[layer][:, -1])))
            torch.testing.assert_close(plain.logits[:, layer], head(states[layer][:, -1]))


def test_top_tokens_are_sorted_by_probability() -> None:
    built = tiny.llava()
    found = logit_lens(mm.HookedModel(built.model), built.inputs, final_norm=True)
    likely, ids = found.top(4, row=1)
    assert bool((likely.diff(dim=-1) <= 0).all())
    torch.testing.assert_close(found.logits[1].softmax(-1).gather(-1, ids), likely)


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
