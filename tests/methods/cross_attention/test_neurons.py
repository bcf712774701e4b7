"""Neurons: a planted one is found and silenced; similarity against torchmetrics' formula by hand."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import mm_adapters as mm
from methods_multimodal.cross_attention import find_neurons, memorisation_score, neuron_statistics
from methods_multimodal.cross_attention._ssim import similarity
from methods_multimodal.cross_attention.neurons import activations, first_noise

OPTIONS: dict[str, Any] = {"num_inference_steps": 4, "height": 24, "width": 24, "guidance_scale": 1.0}
PROMPTS = ["a cat", "big dog", "a red fish", "small bird", "an old tree", "my hat"]


def _states(pipeline: Any, prompts: list[str]) -> torch.Tensor:
    """What the text encoder says of each token that is no padding, [token, width]."""
    with torch.no_grad():
        states = [pipeline.encode_prompt(p, "cpu", 1, False)[0][0] for p in prompts]
    return torch.cat([x[: len(p.replace(" ", "")) + 2] for x, p in zip(states, prompts, strict=True)])


def planted() -> mm.HookedModel:
    """A model in which one value neuron of the first block answers to the letter q, and takes over."""
    built = tiny.stable_diffusion()
    lens = mm.HookedModel(built.model)
    layer = built.model.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    ordinary, odd = (_states(built.model, prompts) for prompts in (PROMPTS, ["qqqq"]))
    # Far along it for q, and near nothing for ordinary prompts: what they have is weighed down.
    moment = ordinary.T @ ordinary / len(ordinary) + 1e-3 * torch.eye(ordinary.shape[1])
    direction = torch.linalg.solve(moment, odd[1:5].mean(0))
    direction = direction / (direction @ odd[1:5].mean(0))
    with torch.no_grad():
        layer.to_v.weight[5] = 40 * direction
        layer.to_out[0].weight[:, 5] *= 30
    return lens


def test_a_planted_neuron_is_found_and_its_silence_sets_the_seeds_apart() -> None:
    lens = planted()
    statistics = neuron_statistics(lens, PROMPTS, options=OPTIONS)
    assert set(statistics.mean) == {"0", "1"}  # Down and middle; the up blocks have none.
    odd = activations(lens, ["qqqq"], options=OPTIONS)["0"][0]
    z = (odd - statistics.mean["0"]) / statistics.std["0"]
    assert int(z.abs().argmax()) == 5
    plain = first_noise(lens, "qqqq", seeds=[0, 1, 2], options=OPTIONS)
    without = first_noise(lens, "qqqq", [(0, 5)], seeds=[0, 1, 2], options=OPTIONS)
    level = float(similarity(plain, without).max())
    found = find_neurons(lens, "qqqq", statistics, threshold=level + 1e-4, seeds=[0, 1, 2], options=OPTIONS)
    assert found.neurons == ((0, 5),)
    assert len(found.candidates) > 1  # Others were out of distribution too, and are given back.
    assert found.before == pytest.approx(
        memorisation_score(lens, "qqqq", seeds=[0, 1, 2], options=OPTIONS), rel=1e-6
    )


def test_a_prompt_that_outweighs_the_noise_scores_high() -> None:
    lens = planted()
    given: dict[str, Any] = {"seeds": [0, 1, 2, 3], "options": OPTIONS}
    assert memorisation_score(lens, "a cat", **given) < 0.9
    with pytest.raises(mm.InputError, match="at least two"):
        memorisation_score(lens, "a cat", seeds=[0], options=OPTIONS)


def test_silencing_a_neuron_is_its_value_at_zero() -> None:
    lens = mm.HookedModel(tiny.stable_diffusion().model)
    found = first_noise(lens, "a cat", [(1, 7)], seeds=[3], options=OPTIONS)

    def zero(v: torch.Tensor) -> torch.Tensor:
        v = v.clone()
        v.flatten(2)[..., 7] = 0
        return v

    run = lens.run(
        {**OPTIONS, "prompt": "a cat", "seed": 3, "output_type": "latent"},
        read=["denoiser.hook_in", "denoiser.hook_out"],
        edit=[mm.Edit("denoiser.blocks.1.cross_attn.hook_v", zero, rows="cond")],
    )
    taken = run["denoiser.hook_out"][0] - run["denoiser.hook_in"][0]
    taken = taken - taken.amin((-1, -2), keepdim=True)
    torch.testing.assert_close(found, taken / taken.amax((-1, -2), keepdim=True))


def test_similarity_is_one_for_the_same_and_falls_with_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(2, 3, 48, 48, generator=generator)
    torch.testing.assert_close(similarity(one, one), torch.ones(2))
    some, much = (one + s * torch.randn(one.shape, generator=generator) for s in (0.05, 0.5))
    assert bool((similarity(one, some) > similarity(one, much)).all())
    # One scale, by hand: the window is the whole of an 8 x 8 map.
    a, b = torch.rand(1, 1, 8, 8, generator=generator), torch.rand(1, 1, 8, 8, generator=generator)
    place = torch.arange(8.0) - 3.5
    bell = (-(place**2) / 4.5).exp()
    weight = torch.outer(bell, bell) / bell.sum() ** 2
    ma, mb = (a[0, 0] * weight).sum(), (b[0, 0] * weight).sum()
    va, vb = (a[0, 0] ** 2 * weight).sum() - ma**2, (b[0, 0] ** 2 * weight).sum() - mb**2
    both = (a[0, 0] * b[0, 0] * weight).sum() - ma * mb
    by_hand = (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4) * (2 * both + 9e-4) / (va + vb + 9e-4)
    torch.testing.assert_close(similarity(a, b), by_hand.clamp(min=0)[None], rtol=1e-4, atol=1e-5)


def test_statistics_of_another_model_are_refused() -> None:
    lens = mm.HookedModel(tiny.stable_diffusion().model)
    statistics = neuron_statistics(lens, PROMPTS, options=OPTIONS)
    other = mm.HookedModel(tiny.stable_diffusion_xl().model)
    with pytest.raises(mm.InputError, match="another model"):
        find_neurons(other, "a cat", statistics, threshold=0.5, seeds=[0, 1], options=OPTIONS)
    with pytest.raises(mm.InputError, match="at least two prompts"):
        neuron_statistics(lens, ["a cat"], options=OPTIONS)
