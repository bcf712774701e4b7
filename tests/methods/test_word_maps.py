"""Word maps: the cross-attention of the conditional half, against plain hooks on to_q and to_k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from einops import rearrange
from torch import Tensor

import mm_adapters as mm
from methods_multimodal._grids import latent_grid
from methods_multimodal.word_maps import WordMaps, WordReader, word_maps, word_reader

INPUTS: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 3, "seed": 0, "height": 16, "width": 24,
                          "output_type": "latent"}  # fmt: skip


def plain_patterns(pipeline: Any) -> dict[tuple[int, int], list[Tensor]]:
    """softmax(q k / sqrt d) of every cross-attention by plain hooks: by the real height and width of
    the feature map it works on, [step, head, pos, token] of the conditional row."""
    size: list[tuple[int, int]] = []
    seen: dict[str, Tensor] = {}
    steps: dict[tuple[str, tuple[int, int]], list[Tensor]] = {}
    handles = []

    def close(name: str, heads: int) -> None:
        q, k = (rearrange(seen[f"{name}.{x}"][1], "n (h d) -> h n d", h=heads) for x in "qk")
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
    arguments = {k: v for k, v in INPUTS.items() if k != "seed"}
    pipeline(**arguments, generator=torch.Generator().manual_seed(0))
    for handle in handles:
        handle.remove()
    found: dict[tuple[int, int], list[Tensor]] = {}
    for (_, grid), patterns in steps.items():
        found.setdefault(grid, []).append(torch.stack(patterns))
    return found


def test_word_maps_equal_plain_hooks_on_a_latent_that_is_not_square() -> None:
    built = tiny.stable_diffusion()
    maps, output = word_maps(mm.HookedModel(built.model), INPUTS)
    expected = plain_patterns(built.model)
    # "a cat" is start, a, c, a, t, end: the letter tokenizer.
    tokens = {"a": [1], "cat": [2, 3, 4]}
    assert maps.words == ("a", "cat")
    assert maps.latent == (8, 12)
    assert set(maps.by_grid) == {f"{h}x{w}" for h, w in expected} == {"8x12", "4x6"}
    for (height, width), layers in expected.items():
        mean = torch.stack(layers).mean(0).mean(1)
        for i, word in enumerate(maps.words):
            own = mean[..., tokens[word]].sum(-1).unflatten(-1, (height, width))
            torch.testing.assert_close(maps.by_grid[f"{height}x{width}"][:, 0, i], own, rtol=1e-4, atol=1e-6)
    assert output.images.shape == (1, 4, 8, 12)


def test_reading_changes_nothing_and_all_tokens_sum_to_one() -> None:
    built = tiny.stable_diffusion()
    model = mm.HookedModel(built.model)
    some = word_reader(model, "a cat")
    every = WordReader(tuple(map(str, range(16))), tuple((i,) for i in range(16)), some.sites, some.size)
    run = model.run(INPUTS, read=every.reads())
    for maps in every.maps(run).by_grid.values():
        torch.testing.assert_close(maps.sum(2), torch.ones_like(maps.sum(2)))
    plain = model.run(INPUTS).output.images
    torch.testing.assert_close(run.output.images, plain, rtol=1e-4, atol=1e-4)


def test_a_word_that_is_not_in_the_prompt_is_refused_before_anything_runs() -> None:
    built = tiny.stable_diffusion()
    model = mm.HookedModel(built.model)
    built.model.unet.forward = lambda *a, **k: pytest.fail("it ran")
    with pytest.raises(mm.WordNotFoundError, match="a, cat"):
        word_maps(model, INPUTS, words=["dog"])
    with pytest.raises(mm.InputError, match="one prompt"):
        word_maps(model, INPUTS | {"prompt": ["a cat", "a dog"]})


def test_at_averages_resolutions_at_the_size_of_the_latent() -> None:
    fine, coarse = torch.rand(2, 1, 1, 4, 6), torch.full((2, 1, 1, 2, 3), 0.5)
    maps = WordMaps({"4x6": fine, "2x3": coarse}, ("cat",), (4, 6))
    torch.testing.assert_close(maps.at(), (fine.mean(0) + 0.5) / 2)
    torch.testing.assert_close(maps.by_step()[1], (fine[1] + 0.5) / 2)
    torch.testing.assert_close(maps.strength(), (fine.mean((-1, -2)) + 0.5) / 2)


def test_word_maps_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    maps = WordMaps({"4x6": torch.rand(2, 1, 1, 4, 6)}, ("cat",), (4, 6))
    back = WordMaps.load(maps.save(tmp_path / "maps.safetensors"))
    assert torch.equal(back.by_grid["4x6"], maps.by_grid["4x6"])
    assert (back.words, back.latent) == (maps.words, maps.latent)


def test_a_grid_is_found_by_halving_and_odd_sizes_round_up() -> None:
    assert latent_grid(96, (8, 12)) == (8, 12)
    assert latent_grid(24, (8, 12)) == (4, 6)
    assert latent_grid(5 * 7, (9, 13)) == (5, 7)
    with pytest.raises(mm.InputError, match="no halving"):
        latent_grid(36, (8, 12))
