"""Word maps of denoisers that are no UNet, against the softmax that the pipeline itself computes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.cross_attention import LocalBlend, WordEdit, bind_attributes, edit_words, word_maps
from methods_multimodal.cross_attention.neurons import first_noise
from mm_adapters import InputError

# "a cat" is start, a, c, a, t, end for the letter tokenizer, in each text encoder that reads it.
TOKENS = {"a": [1], "cat": [2, 3, 4]}
# In "draw a cat now" after the first five tokens, which the transformer does not see.
WITHIN = {"qwen_image": {"a": [0], "cat": [1, 2, 3]}}
STEPS = 2
# What the pipeline's text is: the length of each encoder's part, which side of the joint sequence it is on
# (None: cross-attention), and which patterns of a step are those of text and pixels.
CASES = {
    "stable_diffusion_3": ((16, 6), "after"),
    "flux": ((6,), "before"),
    "qwen_image": ((8,), "before"),
    "pixart": ((6,), None),
}


def computed(pipeline: Any, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """softmax(q k / sqrt d) of every attention of the transformer, in the order they run."""
    found: list[Tensor] = []
    fused = torch.nn.functional.scaled_dot_product_attention
    inside = []

    def watching(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **rest: Any) -> Tensor:
        if inside:
            scores = query @ key.mT * query.shape[-1] ** -0.5
            if attn_mask is not None:
                scores = scores + attn_mask
            found.append(scores.softmax(-1))
        return fused(query, key, value, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watching)
    pipeline.transformer.register_forward_pre_hook(lambda m, a: inside.append(1))
    pipeline.transformer.register_forward_hook(lambda m, a, o: inside.clear())
    given = {k: v for k, v in inputs.items() if k != "seed"}
    with torch.no_grad():
        pipeline(**given, generator=torch.Generator().manual_seed(inputs["seed"]))
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("name", CASES)
def test_word_maps_are_the_attention_from_pixels_to_words(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, side = CASES[name]
    built = tiny.CASES[name]()
    inputs = {
        **built.inputs,
        "prompt": "a cat",
        "seed": 0,
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }
    inputs |= {"negative_prompt": "b"} if inputs.get("negative_prompt") else {}
    n_text = sum(lengths)
    patterns = computed(built.model, inputs, monkeypatch)
    if side is None:
        patterns = [p for p in patterns if p.shape[-1] == n_text]
    maps, _ = word_maps(mm.HookedModel(tiny.CASES[name]().model), inputs, keep=("step", "head"))
    assert maps.n_steps == STEPS
    (grid,) = maps.by_grid.values()
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    n_layers = grid.shape[1]
    # Guidance is a second half of the batch, or a second call of its own: then the text's call comes first.
    calls = len(patterns) // (STEPS * n_layers)
    for word, tokens in WITHIN.get(name, TOKENS).items():
        for step in range(STEPS):
            for layer in range(n_layers):
                pattern = patterns[(step * calls) * n_layers + layer][-1]
                pixels = (
                    pattern
                    if side is None
                    else pattern[:, n_text:]
                    if side == "before"
                    else pattern[:, :-n_text]
                )
                text = (
                    pixels
                    if side is None
                    else pixels[..., :n_text]
                    if side == "before"
                    else pixels[..., -n_text:]
                )
                columns = [start + t for start in starts for t in tokens]
                own = text[..., columns].sum(-1)
                found = grid[step, layer, :, 0, maps.words_of().index(word)].flatten(1)
                torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-6)
    everything, _ = word_maps(
        mm.HookedModel(tiny.CASES[name]().model), inputs, words="tokens", keep=("step",)
    )
    (whole,) = everything.by_grid.values()
    assert (whole.sum(4) <= 1 + 1e-5).all()


def test_prompts_of_several_lengths_are_refused_where_the_pipeline_pads_them_to_the_longest() -> None:
    built = tiny.CASES["qwen_image"]()
    with pytest.raises(InputError, match="8, 9 tokens"):
        word_maps(mm.HookedModel(built.model), built.inputs | {"prompt": ["a cat", "a dogs"]})


def options_of(name: str) -> tuple[mm.HookedModel, dict[str, Any]]:
    case = tiny.CASES[name]()
    said = {"prompt", "negative_prompt", "seed", "output_type", "num_inference_steps"}
    return mm.HookedModel(case.model), {k: v for k, v in case.inputs.items() if k not in said}


@pytest.mark.parametrize("name", ["flux", "pixart", "stable_diffusion_3", "kandinsky_3"])
def test_the_first_noise_is_what_the_first_step_takes_away(name: str) -> None:
    model, options = options_of(name)
    options |= {"num_inference_steps": 2}
    noise = first_noise(model, "a cat", seeds=[0, 1], options=options)
    assert noise.ndim == 4
    inputs = {**options, "prompt": ["a cat"] * 2, "seed": [0, 1], "output_type": "latent"}
    run = model.run(inputs, read=[mm.Read(f"denoiser.{x}", rows="cond") for x in ("hook_in", "hook_out")])
    latents, predicted = (run[f"denoiser.{x}"][0] for x in ("hook_in", "hook_out"))
    if name == "flux":  # Two rows of three positions.
        latents, predicted = (x.unflatten(1, (2, 3)).permute(0, 3, 1, 2) for x in (latents, predicted))
    taken = predicted[:, : latents.shape[1]] - latents
    low, high = taken.amin((-1, -2), keepdim=True), taken.amax((-1, -2), keepdim=True)
    torch.testing.assert_close(noise, (taken - low) / (high - low))


@pytest.mark.parametrize("name", ["flux", "pixart", "stable_diffusion_3"])
def test_what_acts_between_steps_says_so_where_it_cannot(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = options_of(name)
    monkeypatch.setattr(type(model), "run", lambda *a, **k: pytest.fail("heavy work began"))
    with pytest.raises(mm.MissingSiteError, match="Binding moves the latents of a UNet"):
        bind_attributes(model, "red cat", [("red", "cat")], n_steps=2, options=options)
    if name != "stable_diffusion_3":
        edit = WordEdit("a red dog", "replace", blend=LocalBlend(("dog",)))
        with pytest.raises(mm.InputError, match="Local blend"):
            edit_words(model, "a red cat", [edit], n_steps=2, options=options)
