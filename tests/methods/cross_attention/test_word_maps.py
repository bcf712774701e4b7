"""Word maps: the cross-attention of the conditional half, against plain hooks on to_q and to_k."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from einops import rearrange
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.core.grids import latent_grid
from methods_multimodal.cross_attention import WordMaps, word_maps, word_reader

INPUTS: dict[str, Any] = {
    "prompt": "a cat",
    "num_inference_steps": 3,
    "seed": 0,
    "height": 16,
    "width": 24,
    "output_type": "latent",
}
# "a cat" is start, a, c, a, t, end: the letter tokenizer.
TOKENS = {"a": [1], "cat": [2, 3, 4]}


def plain_patterns(
    pipeline: Any, inputs: dict[str, Any], row: int = 1
) -> dict[tuple[int, int], list[Tensor]]:
    """softmax(q k / sqrt d) of every cross-attention by plain hooks: by the real height and width of
    the feature map it works on, [step, head, pos, token] of one row, the conditional one by default."""
    size: list[tuple[int, int]] = []
    seen: dict[str, Tensor] = {}
    steps: dict[tuple[str, tuple[int, int]], list[Tensor]] = {}
    handles = []

    def close(name: str, heads: int) -> None:
        q, k = (rearrange(seen[f"{name}.{x}"][row], "n (h d) -> h n d", h=heads) for x in "qk")
        pattern = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        steps.setdefault((name, size[-1]), []).append(pattern)

    for name, module in pipeline.unet.named_modules():
        if name.endswith("attn2"):
            for part in "qk":
                hook = lambda m, a, o, key=f"{name}.{part}": seen.update({key: o})  # noqa: E731
                handles.append(getattr(module, f"to_{part}").register_forward_hook(hook))
            done = lambda m, a, o, n=name: close(n, m.heads)  # noqa: E731
            handles.append(module.register_forward_hook(done))
        elif type(module).__name__ == "Transformer2DModel":
            handles.append(module.register_forward_pre_hook(lambda m, a: size.append(tuple(a[0].shape[-2:]))))
    arguments = {k: v for k, v in inputs.items() if k != "seed"}
    seeds = inputs["seed"] if isinstance(inputs["seed"], list) else [inputs["seed"]]
    made = [torch.Generator().manual_seed(s) for s in seeds]
    with torch.no_grad():
        pipeline(**arguments, generator=made if isinstance(inputs["seed"], list) else made[0])
    for handle in handles:
        handle.remove()
    found: dict[tuple[int, int], list[Tensor]] = {}
    for (_, grid), patterns in steps.items():
        found.setdefault(grid, []).append(torch.stack(patterns))
    return found


def by_words(layers: list[Tensor], tokens: list[int], size: tuple[int, int]) -> Tensor:
    """[layer, step, head, height, width] of one word."""
    return torch.stack([p[..., tokens].sum(-1).unflatten(-1, size) for p in layers])


def test_every_kept_part_equals_plain_hooks_on_a_latent_that_is_not_square() -> None:
    built = tiny.stable_diffusion()
    maps, output = word_maps(mm.HookedModel(built.model), INPUTS, keep=("step", "head"))
    expected = plain_patterns(built.model, INPUTS)
    assert maps.words == (("a", "cat"),)
    assert maps.latent == (8, 12)
    assert set(maps.by_grid) == {f"{h}x{w}" for h, w in expected} == {"8x12", "4x6"}
    for (height, width), layers in expected.items():
        found = maps.by_grid[f"{height}x{width}"]
        for i, word in enumerate(maps.words_of()):
            own = rearrange(by_words(layers, TOKENS[word], (height, width)), "l s n h w -> s l n h w")
            torch.testing.assert_close(found[:, :, :, 0, i], own, rtol=1e-4, atol=1e-6)
    assert output.images.shape == (1, 4, 8, 12)


def test_what_is_not_kept_is_the_mean() -> None:
    model = mm.HookedModel(tiny.stable_diffusion().model)
    whole, _ = word_maps(model, INPUTS, keep=("step", "head"))
    lean, _ = word_maps(model, INPUTS, keep=())
    for grid, maps in lean.by_grid.items():
        torch.testing.assert_close(maps, whole.by_grid[grid].mean((0, 2))[None, :, None])
    torch.testing.assert_close(lean.at(), whole.at())
    with pytest.raises(mm.InputError, match="keep"):
        lean.by_step()
    with pytest.raises(mm.InputError, match="keep"):
        lean.at("daam")
    with pytest.raises(mm.InputError, match="spread=True"):
        lean.at("spread")
    with pytest.raises(mm.InputError, match="mean, daam, spread"):
        lean.at("best")


def test_relative_maps_are_set_against_the_mean_over_every_word_whichever_have_maps() -> None:
    built = tiny.stable_diffusion()
    inputs = INPUTS | {"prompt": "a cat dog"}
    maps, _ = word_maps(mm.HookedModel(built.model), inputs, words=["cat"], keep=("step",))
    tokens = {"a": [1], "cat": [2, 3, 4], "dog": [5, 6, 7]}
    layers = []
    for (height, width), patterns in plain_patterns(built.model, inputs).items():
        words = torch.stack([by_words(patterns, t, (height, width)) for t in tokens.values()])
        every = words.mean(0)  # [layer, step, head, height, width]
        found = maps.all_words[f"{height}x{width}"]
        torch.testing.assert_close(found[:, :, 0, 0], every.mean(2).transpose(0, 1), rtol=1e-4, atol=1e-6)
        for word, mean in zip(words[1].mean((1, 2)), every.mean((1, 2)), strict=True):
            ratio = (word / mean).log()
            standard = ((ratio - ratio.mean()) / ratio.std())[None, None]
            layers.append(torch.nn.functional.interpolate(standard, size=(8, 12), mode="bicubic")[0, 0])
    torch.testing.assert_close(maps.heat("cat"), torch.stack(layers).mean(0), rtol=1e-3, atol=1e-4)
    whole, _ = word_maps(mm.HookedModel(built.model), inputs)
    torch.testing.assert_close(whole.heat("cat"), maps.heat("cat"))
    # At one step alone it is that step's, of the word and of the mean.
    last = slice(2, 3)
    alone = WordMaps(**{
        **vars(maps),
        "by_grid": {k: v[last] for k, v in maps.by_grid.items()},
        "all_words": {k: v[last] for k, v in maps.all_words.items()},
        "n_steps": 1,
    })  # fmt: skip
    torch.testing.assert_close(maps.at("relative", last), alone.at("relative"))
    without = WordMaps(**{**vars(maps), "all_words": {}})
    with pytest.raises(mm.InputError, match="without the mean over all words"):
        without.heat("cat")


def test_affinity_is_the_self_attention_of_the_finest_layers_in_the_middle_of_the_run() -> None:
    model = mm.HookedModel(tiny.stable_diffusion().model)
    inputs = INPUTS | {"num_inference_steps": 10}
    maps, _ = word_maps(model, inputs, spread=True)
    sites = [f"denoiser.blocks.{i}.attn.hook_pattern" for i in (0, 2, 3)]
    run = model.run(inputs, read=[mm.Read(s, rows="cond", steps=[5]) for s in sites])
    slow = torch.stack([run[s].mean((0, 2)) for s in sites]).mean(0)
    torch.testing.assert_close(maps.affinity, slow)
    assert maps.affinity_grid == (8, 12)


def test_prompts_of_a_batch_and_images_of_a_prompt_are_kept_apart() -> None:
    built = tiny.stable_diffusion()
    model = mm.HookedModel(built.model)
    both = INPUTS | {"prompt": ["a cat", "dog"], "num_images_per_prompt": 2, "seed": [1, 2, 3, 4]}
    maps, _ = word_maps(model, both, keep=("head",))
    assert maps.words == (("a", "cat"), ("dog",))
    assert [maps.words_of(i) for i in range(4)] == [("a", "cat")] * 2 + [("dog",)] * 2
    # Rows are the four unconditional ones, then the four conditional.
    for image, (tokens, word) in enumerate([([2, 3, 4], 1), ([2, 3, 4], 1), ([1, 2, 3], 0), ([1, 2, 3], 0)]):
        for (height, width), layers in plain_patterns(built.model, both, 4 + image).items():
            own = by_words(layers, tokens, (height, width)).mean(1)
            found = maps.by_grid[f"{height}x{width}"][0, :, :, image, word]
            torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-6)


def test_without_guidance_every_head_is_there() -> None:
    built = tiny.stable_diffusion()
    inputs = INPUTS | {"guidance_scale": 1.0}
    maps, _ = word_maps(mm.HookedModel(built.model), inputs, keep=("head",))
    for (height, width), layers in plain_patterns(built.model, inputs, row=0).items():
        own = by_words(layers, TOKENS["cat"], (height, width)).mean(1)
        torch.testing.assert_close(
            maps.by_grid[f"{height}x{width}"][0, :, :, 0, 1], own, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_who_only_watches_gets_the_same_picture_bit_for_bit(name: str, scale: float) -> None:
    model = mm.HookedModel(tiny.CASES[name]().model)
    inputs = {
        "prompt": ["a cat", "dog"],
        "num_inference_steps": 3,
        "seed": 0,
        "output_type": "pt",
        "guidance_scale": scale,
    }
    _, output = word_maps(model, inputs, keep=("step", "head"), spread=True)
    assert torch.equal(output.images, model.run(inputs).output.images)


def test_all_tokens_sum_to_one_and_start_and_end_are_shown_on_demand() -> None:
    model = mm.HookedModel(tiny.stable_diffusion().model)
    maps, _ = word_maps(model, INPUTS, words=["<start>", "a", "cat", "<end>", "<pad>"])
    for found in maps.by_grid.values():
        torch.testing.assert_close(found.sum(4), torch.ones_like(found.sum(4)))
    tokens, _ = word_maps(model, INPUTS, words="tokens")
    assert tokens.words_of() == ("<start>", "a", "cat", "cat", "cat", "<end>")
    torch.testing.assert_close(tokens.at()[0, 2:5].sum(0), maps.at()[0, 2])


def test_mistakes_are_refused_before_anything_runs() -> None:
    built = tiny.stable_diffusion()
    model = mm.HookedModel(built.model)
    built.model.unet.forward = lambda *a, **k: pytest.fail("it ran")
    with pytest.raises(mm.WordNotFoundError, match="a, cat"):
        word_maps(model, INPUTS, words=["dog"])
    with pytest.raises(mm.InputError, match="a prompt"):
        word_maps(model, INPUTS | {"prompt": None})
    with pytest.raises(mm.InputError, match="step, head"):
        word_maps(model, INPUTS, keep=["layer"])
    with pytest.raises(mm.MissingSiteError, match=r"attends to words.*vision, text"):
        word_maps(mm.HookedModel(tiny.clip().model), INPUTS)


def test_not_a_number_is_an_error_that_names_the_layer_and_the_step() -> None:
    pipe = tiny.stable_diffusion().model
    model = mm.HookedModel(pipe)
    reader = word_reader(model, "a cat")
    calls = itertools.count()
    query = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q
    query.register_forward_hook(lambda module, args, q: q * float("nan") if next(calls) == 1 else None)
    run = model.run(INPUTS, read=reader.reads())
    with pytest.raises(mm.InputError, match=r"blocks.0.cross_attn.hook_pattern holds NaN at step 1"):
        reader.maps(run)


def test_attention_that_cannot_be_watched_is_refused_with_the_reason() -> None:
    built = tiny.stable_diffusion()

    class Hidden:
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden_states  # A kernel that passes us by.

    built.model.unet.set_attn_processor(Hidden())
    with pytest.raises(mm.AttentionUnreachableError, match="cannot be watched"):
        word_maps(mm.HookedModel(built.model), INPUTS)


def test_a_cache_that_passes_blocks_over_is_refused() -> None:
    built = tiny.stable_diffusion()
    block = built.model.unet.mid_block.attentions[0]
    plain, seen = block.forward, []

    def cached(*args: Any, **kwargs: Any) -> Any:
        seen.append(plain(*args, **kwargs) if len(seen) != 1 else seen[0])
        return seen[-1]

    block.forward = cached
    with pytest.raises(mm.AttentionUnreachableError, match=r"2 of 3 steps.*cache"):
        word_maps(mm.HookedModel(built.model), INPUTS)


def record(by_grid: dict[str, Tensor], latent: tuple[int, int], affinity: Tensor | None = None) -> WordMaps:
    """A record made by hand."""
    n = tuple(tuple(range(maps.shape[1])) for maps in by_grid.values())
    steps, words = next(iter(by_grid.values())).shape[0], next(iter(by_grid.values())).shape[4]
    given = torch.zeros(1, 0, 0) if affinity is None else affinity
    return WordMaps(
        by_grid,
        (("cat",) * words,),
        ((1,) * words,),
        n,
        tuple(("up",) * len(x) for x in n),
        latent,
        steps,
        given,
        latent if affinity is not None else (0, 0),
    )


def test_at_averages_resolutions_at_the_size_of_the_latent() -> None:
    fine, coarse = torch.rand(2, 1, 1, 1, 1, 4, 6), torch.full((2, 1, 1, 1, 1, 2, 3), 0.5)
    maps = record({"4x6": fine, "2x3": coarse}, (4, 6))
    torch.testing.assert_close(maps.at(), (fine.mean((0, 1, 2)) + 0.5) / 2)
    torch.testing.assert_close(maps.by_step()[1], (fine[1, 0, 0] + 0.5) / 2)
    torch.testing.assert_close(maps.strength(), (fine.mean((1, 2, -1, -2)) + 0.5) / 2)
    torch.testing.assert_close(maps.at(grid="4x6"), fine.mean((0, 1, 2)))


def test_a_map_spreads_over_the_pixels_that_attend_to_each_other() -> None:
    # Six pixels in two groups; attention stays within a group, and one pixel of the first is hot.
    group = torch.tensor([0, 0, 1, 1, 1, 0])
    affinity = (group[:, None] == group).float()[None] / 3
    hot = torch.zeros(1, 1, 1, 1, 1, 2, 3)
    hot[..., 0, 1] = 1.0
    found = record({"2x3": hot}, (2, 3), affinity).at("spread")[0, 0].flatten()
    mean, std = hot.mean(), hot.std()
    torch.testing.assert_close(found[group == 0], torch.full((3,), float((1 / 3 - mean) / std)))
    torch.testing.assert_close(found[group == 1], torch.full((3,), float((0 - mean) / std)))


def test_word_maps_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    maps = record({"4x6": torch.rand(2, 1, 1, 1, 1, 4, 6)}, (4, 6))
    back = WordMaps.load(maps.save(tmp_path / "maps.safetensors"))
    assert torch.equal(back.by_grid["4x6"], maps.by_grid["4x6"])
    assert (back.words, back.latent, back.stages) == (maps.words, maps.latent, maps.stages)


def test_a_grid_is_found_by_halving_and_odd_sizes_round_up() -> None:
    assert latent_grid(96, (8, 12)) == (8, 12)
    assert latent_grid(24, (8, 12)) == (4, 6)
    assert latent_grid(5 * 7, (9, 13)) == (5, 7)
    with pytest.raises(mm.InputError, match="no halving"):
        latent_grid(36, (8, 12))
