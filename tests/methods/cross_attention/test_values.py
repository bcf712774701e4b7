"""What is blocked and what is blended, by value, number by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.cross_attention import LocalBlend, _knockout
from methods_multimodal.cross_attention._blending import Blender
from methods_multimodal.cross_attention._rows import generate
from methods_multimodal.cross_attention.word_reader import Fold

PROMPTS = ["a red cat", "a red dog"]
OPTIONS: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 2}


def model() -> mm.HookedModel:
    return mm.HookedModel(tiny.stable_diffusion().model)


def layouts(lens: mm.HookedModel, prompts: Sequence[str] = PROMPTS) -> list[mm.TokenLayout]:
    return [lens.prompt_layout("text", [prompt]) for prompt in prompts]


# ---- blocked attention ---------------------------------------------------------------------------


def test_blocked_scores_are_those_of_the_heads_queries_and_keys_that_are_named() -> None:
    scores = torch.randn(3, 4, 5)
    for heads, queries in (([0, 2], [1, 3]), (None, [2]), ([1], None), (None, None)):
        found = _knockout.BlockKeys([0, 4], queries, heads)(scores, scores[None])
        for head in range(3):
            for query in range(4):
                for key in range(5):
                    blocked = (
                        (heads is None or head in heads)
                        and (queries is None or query in queries)
                        and key in (0, 4)
                    )
                    want = -torch.inf if blocked else scores[head, query, key]
                    assert found[head, query, key] == want


def test_a_word_is_blocked_from_those_after_it_and_not_from_itself() -> None:
    lens = model()
    (layout,) = layouts(lens, ["a red cat"])
    word = layout.where("red")
    assert len(word) > 1  # Its later tokens go on attending to its earlier ones.
    edits = _knockout.block_in_text(lens, 1, "a red cat", "red")
    assert edits
    assert {edit.row for edit in edits} == {1}
    assert {edit.site for edit in edits} == {site.name for site in lens.sites("text.*attn.hook_attn_scores")}
    first = "text.blocks.0.attn.hook_pattern"
    patterns: list[Tensor] = []
    reads = [mm.Read(first, reduce=lambda x: patterns.append(x.clone()) or x.new_zeros(0), rows="cond")]
    generate(lens, ["a red cat"] * 2, [0, 0], edits, read=reads, options=OPTIONS)
    plain, blocked = patterns[0]
    want = plain.clone()
    for query in range(max(word) + 1, plain.shape[1]):
        want[:, query, word] = 0
        want[:, query] /= want[:, query].sum(-1, keepdim=True)
    torch.testing.assert_close(blocked, want, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(blocked[:, max(word) + 1 :], plain[:, max(word) + 1 :], atol=1e-3)


def test_what_is_left_of_a_block_is_its_largest_weight_at_its_own_steps() -> None:
    from methods_multimodal.cross_attention._rows import RowEdit

    site = "denoiser.blocks.1.cross_attn.hook_attn_scores"
    edits = [RowEdit(site, 1, _knockout.BlockKeys([2], [0], None), frozenset({1}))]
    (left,) = _knockout.watch(edits).values()
    pattern = torch.zeros(2, 2, 3, 4)
    pattern[1, 0, 0, 2], pattern[0, 0, 0, 2], pattern[1, 1, 1, 2] = 0.25, 0.9, 0.8
    left(pattern, mm.Call(0, 0))
    assert left.most == 0
    left(pattern, mm.Call(1, 0))
    assert left.most == 0.25
    with pytest.raises(RuntimeError, match=r"still has 0\.25"):
        _knockout.verify({site: left})
    never = _knockout.AttentionLeft(site, edits)
    with pytest.raises(RuntimeError, match="was never read"):
        _knockout.verify({site: never})
    _knockout.verify({})


# ---- blends --------------------------------------------------------------------------------------


def blender(blends: dict[int, LocalBlend], n_steps: int = 5, prompts: Sequence[str] = PROMPTS) -> Blender:
    lens = model()
    return Blender(lens, prompts, layouts(lens, prompts), blends, n_steps)


@pytest.mark.parametrize(("start", "first"), [(0.0, 0), (0.2, 1), (0.5, 2), (0.79, 3), (1.0, 5)])
def test_a_blend_starts_at_its_share_of_the_steps(start: float, first: int) -> None:
    found = blender({1: LocalBlend(("dog",), start=start)})
    outside = torch.zeros(4, 6, dtype=torch.bool)
    outside[1, 2] = True
    found.region = lambda *_: outside  # type: ignore[method-assign]
    latents = torch.randn(2, 3, 4, 6)
    for step in range(5):
        new = found.after_step(None, step, None, {"latents": latents})["latents"]
        assert torch.equal(new[0], latents[0])
        want = latents[1].clone()
        if step >= first:
            want = latents[0].clone()
            want[:, 1, 2] = latents[1, :, 1, 2]
        assert torch.equal(new[1], want), step


def test_each_row_has_the_region_of_its_own_blend() -> None:
    prompts = ["a red cat", "a red dog", "a big cat"]
    found = blender({1: LocalBlend(("dog",), start=0.0), 2: LocalBlend(("cat",), start=1.0)}, 4, prompts)
    seen = []
    found.region = lambda *a: seen.append(a) or torch.zeros(4, 6, dtype=torch.bool)  # type: ignore[method-assign]
    latents = torch.randn(3, 2, 4, 6)
    new = found.after_step(None, 3, None, {"latents": latents})["latents"]
    assert [(index, row, size) for index, row, _, size in seen] == [(0, 1, (4, 6))]
    assert torch.equal(new[1], latents[0])
    assert torch.equal(new[2], latents[2])
    with pytest.raises(mm.InputError, match="Local blend takes latents"):
        found.after_step(None, 3, None, {"latents": latents.flatten(1)})


def test_a_blends_words_may_be_of_the_source_or_of_the_target_alone() -> None:
    lens = model()
    source, target = layouts(lens)
    found = blender({1: LocalBlend(("cat", "dog", "red"))})
    want = torch.zeros(1, 2, source.n_pos)
    want[0, 0, source.where("cat") + source.where("red")] = 1
    want[0, 1, target.where("dog") + target.where("red")] = 1
    assert torch.equal(found.which, want)
    with pytest.raises(mm.WordNotFoundError):
        blender({1: LocalBlend(("cat", "fish"))})


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_a_region_is_where_either_prompts_words_are_above_the_threshold(threshold: float) -> None:
    found = blender({1: LocalBlend(("cat",), threshold=threshold)})
    lots = torch.Generator().manual_seed(3)
    # Two layers of the finest resolution that counts, one coarser and one too fine.
    maps = [torch.rand(1, 2, n, generator=lots) ** 4 / 50 for n in (24, 24, 6, 384)]
    for layer, prompt, place, height in ((0, 0, 0, 1.0), (1, 0, 23, 0.9), (0, 1, 3, 0.8), (1, 1, 20, 0.4)):
        maps[layer][0, prompt, place] = height
    found.folds = {str(i): Fold(lambda x: x, sums={0: m}, counts={0: 1}) for i, m in enumerate(maps)}
    got = found.region(0, 1, LocalBlend(("cat",), threshold=threshold), (8, 12))
    mean = ((maps[0] + maps[1]) / 2)[0].view(2, 4, 6)
    want = torch.zeros(8, 12, dtype=torch.bool)
    for heat in mean:
        spread = torch.zeros(4, 6)
        for r in range(4):
            for c in range(6):
                spread[r, c] = heat[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].max()
        inside = spread / spread.max() > threshold
        want |= inside.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(got, want)
    assert 0 < int(got.sum()) < got.numel()


def test_a_words_map_is_the_mean_over_heads_of_its_tokens_attention() -> None:
    lens = model()
    found = blender({1: LocalBlend(("cat",))})
    run: dict[str, Tensor] = {}
    site = next(iter(found.folds))
    pattern = torch.rand(2, 3, 6, layouts(lens)[0].n_pos)
    found.folds[site](pattern, mm.Call(0, 0))
    run[site] = found.folds[site].sums[0]
    cat, dog = layouts(lens)[0].where("cat"), layouts(lens)[1]
    want = pattern[0].mean(0)[:, cat].sum(-1)
    torch.testing.assert_close(run[site][0, 0], want)
    assert not run[site][0, 1].any()
    assert dog.where("dog")
