"""Tracing: patches against runs of their own, knockouts against a model without the word, planted layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.cross_attention import (
    Case,
    Effects,
    Part,
    ablate_heads,
    attribute_patching,
    by_rule,
    correlation,
    grid,
    knock_out_words,
    patch_words,
    restore_layers,
    restore_text,
    step_groups,
)
from methods_multimodal.cross_attention import _knockout as knockout
from methods_multimodal.cross_attention import _rows as rows
from methods_multimodal.cross_attention._turned import TURNED, turned
from methods_multimodal.cross_attention.cases import align_positions, matched_words, positions_of_word
from methods_multimodal.cross_attention.generation import generate_checked
from methods_multimodal.cross_attention.tracing import knockout_edits, patch_edits

OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "height": 16, "width": 24, "guidance_scale": 3.0}
CASES = [Case("a big cat", "big", "a red cat", "red", seed=0), Case("cat", "cat", "dog", "dog", seed=1)]


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def model() -> mm.HookedModel:
    return mm.HookedModel(tiny.stable_diffusion().model)


def picture(lens: mm.HookedModel, prompt: str, seed: int, **run: Any) -> Tensor:
    return lens.run({**OPTIONS, "prompt": prompt, "seed": seed, "output_type": "pt"}, **run).output.images


def test_patching_a_word_and_all_that_follows_it_draws_the_other_prompt() -> None:
    # Nothing before the word knows of it, so its keys and values and all later ones are the prompt.
    lens = model()
    found = patch_words(lens, CASES, brightness, positions="after", options=OPTIONS)
    for i, case in enumerate(CASES):
        torch.testing.assert_close(found.base[i], brightness(picture(lens, case.prompt, case.seed))[0])
        torch.testing.assert_close(found.goal[i], brightness(picture(lens, case.other, case.seed))[0])
    torch.testing.assert_close(found.changed[0], found.goal)
    torch.testing.assert_close(found.share().mean, torch.ones(1))
    # That is no finding: it is the same as drawing the other prompt. A part of it, or the word alone, is one.
    assert found.by_construction == (True,)
    alone = patch_words(lens, CASES[:1], brightness, positions="word", options=OPTIONS)
    assert alone.by_construction == (False,)
    steps = [Part(steps=(0, 1, 2)), Part(steps=(0, 1))]
    assert patch_words(lens, CASES[:1], brightness, steps, options=OPTIONS).by_construction == (True, False)


def test_the_control_of_a_patch_changes_the_same_keys_and_values_as_far_in_another_direction() -> None:
    lens, case = model(), CASES[0]
    layers = [f"denoiser.blocks.1.cross_attn.hook_{x}" for x in "kv"]
    read = [mm.Read(name, rows="cond") for name in layers]
    part = Part(layers=(1,))
    edits = patch_edits(lens, case, 2, 1, part, positions="word")
    edits += turned(patch_edits(lens, case, 3, 1, part, positions="word"), 3, 0, 0)
    edits += turned(patch_edits(lens, case, 4, 1, part, positions="word"), 4, 0, 1)
    run = lens.run(
        {
            **OPTIONS,
            "prompt": [case.prompt, case.other, *[case.prompt] * 3],
            "seed": [0] * 5,
            "output_type": "pt",
        },
        read=read,
        edit=rows.edits(edits),
    )
    for name in layers:
        value = run[name][0]
        own, control, another = (value[i] - value[0] for i in (2, 3, 4))
        at = [2, 3, 4]  # The tokens of "big".
        for change in (own, control, another):
            still = [p for p in range(change.shape[0]) if p not in at]
            assert not change[still].any()
        flat = [x[at].flatten(0, 1) for x in (own, control, another)]
        assert flat[0].norm(dim=-1).min() > 1e-3
        # Each position and head moves as far, and the angles between them stay.
        for other in flat[1:]:
            torch.testing.assert_close(other @ other.T, flat[0] @ flat[0].T, rtol=1e-3, atol=1e-4)
            assert torch.nn.functional.cosine_similarity(other, flat[0]).abs().mean() < 0.8
        assert not torch.allclose(flat[1], flat[2], atol=1e-3)


def test_the_control_in_effects_is_that_of_each_part() -> None:
    lens, case = model(), CASES[0]
    parts = [Part((1,)), Part((3,), None, (0,))]
    found = patch_words(lens, [case], brightness, parts, positions="word", options=OPTIONS, control_seed=4)
    assert found.control_of == (TURNED,)
    for i, part in enumerate(parts):
        edits = turned(patch_edits(lens, case, 2, 1, part, positions="word"), 2, 4, 0)
        images = generate_checked(lens, [case.prompt, case.other, case.prompt], 0, edits, OPTIONS)
        torch.testing.assert_close(found.control[i, 0], brightness(images)[2])
    other = patch_words(lens, [case], brightness, parts, positions="word", options=OPTIONS, control_seed=5)
    assert not torch.allclose(other.control, found.control, atol=1e-7)
    torch.testing.assert_close(other.changed, found.changed)


def test_the_control_of_a_block_is_another_word_of_as_many_tokens_after_it() -> None:
    lens = model()

    def words(prompt: str, word: str) -> list[str]:
        return matched_words(lens.prompt_layout("text", [prompt]), word)

    # The letter tokenizer has a token for each letter.
    assert words("red cat and dog", "cat") == ["and", "dog"]
    assert words("red cat and dog", "dog") == ["red", "cat", "and"]  # None stands after it.
    assert words("a big cat", "a big") == []
    assert words("a tiger or cats", "tiger") == []  # "or" and "cats" have two and four tokens...
    assert words("a tiger or cat", "tiger") == ["or cat"]  # ... and "or cat" has five together.
    assert words("a cat a dog", "cat") == ["dog"]  # "a" stands twice, with two tokens; "a dog" has four.
    case = Case("a cat and dog", "cat", seed=0)
    found = knock_out_words(lens, [case], brightness, [Part((1,))], options=OPTIONS)
    (said,) = found.control_of
    word = said.split("”")[0].removeprefix("“")
    assert word in ("and", "dog")
    edits = knockout_edits(lens, Case(case.prompt, word), 1, Part((1,)))
    images = generate_checked(lens, [case.prompt] * 2, 0, edits, OPTIONS)
    torch.testing.assert_close(found.control[0, 0], brightness(images)[1])
    none = knock_out_words(lens, [Case("a big cat", "a big")], brightness, options=OPTIONS)
    assert none.control_of == ("",)
    assert none.control.shape == (1, 0)
    assert none.control_share().mean.isnan().all()


def test_a_part_equals_one_run_with_one_edit() -> None:
    lens, case = model(), CASES[0]
    part = Part(layers=(1,), heads=(2,), steps=(0, 2))
    found = patch_words(
        lens, [case], brightness, [part, Part(layers=(3,))], positions="word", options=OPTIONS
    )
    names = [f"denoiser.blocks.1.cross_attn.hook_{x}" for x in "kv"]
    inputs = {**OPTIONS, "prompt": case.other, "seed": case.seed, "output_type": "pt"}
    donor = lens.run(inputs, read=[mm.Read(n, rows="cond") for n in names])

    def put(name: str) -> Any:
        def fn(value: Tensor) -> Tensor:
            value = value.clone()
            value[:, 2:5, 2] = donor[name][0, :, 2:5, 2]  # "big" and "red" are tokens 2 to 4.
            return value

        return mm.Edit(name, fn, rows="cond", steps=[0, 2])

    slow = picture(lens, case.prompt, case.seed, edit=[put(n) for n in names])
    torch.testing.assert_close(found.changed[0], brightness(slow))
    assert abs(float(found.changed[0] - found.base)) > 1e-6
    assert float(found.changed[0]) != float(found.changed[1])


def test_only_the_layer_that_reads_the_words_has_an_effect() -> None:
    built = tiny.stable_diffusion()
    lens = mm.HookedModel(built.model)
    for name, module in built.model.unet.named_modules():
        if name.endswith("attn2.to_out.0") and "mid_block" not in name:
            with torch.no_grad():
                module.weight.zero_()
    parts = grid(lens)
    found = patch_words(lens, CASES, brightness, parts, options=OPTIONS)
    middle = [p.layers for p in parts].index((1,))
    share = found.share()
    torch.testing.assert_close(share.mean[middle], torch.tensor(1.0), rtol=1e-3, atol=1e-3)
    assert all(abs(float(share.mean[i])) < 1e-3 for i in range(len(parts)) if i != middle)
    assert float(share.low[middle]) > 0.99


def test_a_window_of_layers_at_every_position_is_locogen() -> None:
    lens = model()
    windows = grid(lens, layers=2)
    assert [w.layers for w in windows] == [(0, 1), (1, 2), (2, 3)]
    case = Case("a big cat", "", "dog", seed=0)
    found = patch_words(lens, [case], brightness, windows, options=OPTIONS)
    names = [f"denoiser.blocks.{i}.cross_attn.hook_{x}" for i in (1, 2) for x in "kv"]
    inputs = {**OPTIONS, "prompt": "dog", "seed": 0, "output_type": "pt"}
    donor = lens.run(inputs, read=[mm.Read(n, rows="cond") for n in names])
    edits = [mm.Edit(n, lambda v, n=n: donor[n][0].clone(), rows="cond") for n in names]
    torch.testing.assert_close(found.changed[1], brightness(picture(lens, case.prompt, 0, edit=edits)))


def test_blocked_attention_is_gone_and_a_block_that_does_nothing_is_an_error() -> None:
    lens, case = model(), CASES[0]
    changes = knockout_edits(lens, case, 1)
    watched = knockout.watch(changes)
    reads = [mm.Read(site, reduce=left, rows="cond") for site, left in watched.items()]
    from methods_multimodal.cross_attention._rows import generate

    generate(lens, [case.prompt] * 2, [0, 0], changes, read=reads, options=OPTIONS)
    assert {left.most for left in watched.values()} == {0.0}
    assert any(site.startswith("text.") for site in watched)
    # The same looks at a run in which nobody blocked anything.
    watched = knockout.watch(changes)
    reads = [mm.Read(site, reduce=left, rows="cond") for site, left in watched.items()]
    generate(lens, [case.prompt] * 2, [0, 0], read=reads, options=OPTIONS)
    with pytest.raises(RuntimeError, match="not blocked"):
        knockout.verify(watched)


def test_a_blocked_word_changes_nothing_any_more() -> None:
    lens = model()
    # Two prompts that differ in one word give one picture where nobody attends to it.
    one, two = (Case(f"a {word} cat", word) for word in ("big", "red"))
    pictures = [
        generate_checked(lens, [c.prompt] * 2, 0, knockout_edits(lens, c, 1), OPTIONS) for c in (one, two)
    ]
    torch.testing.assert_close(pictures[0][1], pictures[1][1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pictures[0][0], pictures[1][0], atol=1e-4)
    # The words after it carry it, if they may look at it.
    pictures = [
        generate_checked(lens, [c.prompt] * 2, 0, knockout_edits(lens, c, 1, text=False), OPTIONS)
        for c in (one, two)
    ]
    assert not torch.allclose(pictures[0][1], pictures[1][1], atol=1e-4)


def test_a_word_that_stands_twice_is_blocked_for_the_words_between() -> None:
    lens = model()
    case = Case("a cat a dog", "a")
    pattern = "text.blocks.1.attn.hook_pattern"
    run = lens.run(
        {**OPTIONS, "prompt": [case.prompt] * 2, "seed": [0, 0], "output_type": "pt"},
        read=[mm.Read(pattern, rows="cond")],
        edit=rows.edits(knockout.block_in_text(lens, 1, case.prompt, "a")),
    )
    plain, blocked = run[pattern]  # A text encoder runs once: there is no axis of steps.
    at = [1, 5]  # start, a, c, a, t, a, d, o, g, end.
    others = [p for p in range(plain.shape[-1]) if p not in at]
    assert plain[:, 2, 1].min() > 0
    assert not blocked[:, others][..., at].any()
    torch.testing.assert_close(blocked.sum(-1), torch.ones_like(blocked.sum(-1)))


def test_knockouts_by_part_reach_the_goal_together() -> None:
    found = knock_out_words(model(), CASES[:1], brightness, [Part(), *grid(model())], options=OPTIONS)
    torch.testing.assert_close(found.changed[0], found.goal)
    assert found.changed.shape == (5, 1)
    assert found.by_construction == (True, False, False, False, False)


def test_an_ablated_head_gives_zero() -> None:
    lens = model()
    found = ablate_heads(lens, CASES[:1], brightness, grid(lens, heads=True), options=OPTIONS)

    def zero(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, :, 1] = 0
        return z

    edit = mm.Edit("denoiser.blocks.2.cross_attn.hook_z", zero, rows="cond")
    slow = brightness(picture(lens, "a big cat", 0, edit=[edit]))
    at = found.parts.index(Part((2,), (1,)))
    torch.testing.assert_close(found.changed[at], slow)


def test_restoring_every_way_the_text_reaches_the_picture_gives_the_clean_one() -> None:
    lens = model()
    text = restore_text(lens, CASES[:1], brightness, part="hook_resid_post", at="after", options=OPTIONS)
    # After the last layer nothing of the corruption is left.
    torch.testing.assert_close(text.changed[-1], text.goal)
    assert abs(float(text.base - text.goal)) > 1e-5
    again = restore_text(lens, CASES[:1], brightness, part="hook_resid_post", at="after", options=OPTIONS)
    assert torch.equal(text.changed, again.changed)
    layers = restore_layers(lens, CASES[:1], brightness, options=OPTIONS)
    assert layers.layers == ((0,), (1,), (2,), (3,))
    assert len({round(float(x), 7) for x in layers.changed[:, 0]}) > 1
    with pytest.raises(mm.InputError, match="'last' token"):
        restore_text(lens, CASES, brightness, at="first", options=OPTIONS)


def test_attribution_is_the_derivative_of_patching() -> None:
    lens, case = model(), CASES[0]
    found = attribute_patching(lens, [case], brightness, options=OPTIONS)
    names = [f"denoiser.blocks.2.cross_attn.hook_{x}" for x in "kv"]
    inputs = {**OPTIONS, "prompt": case.other, "seed": 0, "output_type": "pt"}
    donor = lens.run(inputs, read=[mm.Read(n, rows="cond") for n in names])

    def moved(share: float) -> Tensor:
        """The picture with one head at one step a small way along."""

        def put(name: str) -> mm.Edit:
            def fn(value: Tensor) -> Tensor:
                value = value.clone()
                part = value[:, 2:, 3]
                value[:, 2:, 3] = part + share * (donor[name][1, :, 2:, 3] - part)
                return value

            return mm.Edit(name, fn, rows="cond", steps=[1])

        return brightness(picture(lens, case.prompt, 0, edit=[put(n) for n in names])).double()

    slope = (moved(0.2) - moved(-0.2)) / 0.4
    got = found.of([Part((2,), (3,), (1,))])[0]
    torch.testing.assert_close(got.double(), slope, rtol=0.05, atol=2e-6)


def test_attribution_agrees_with_exact_patching_of_every_layer_and_head() -> None:
    lens = model()
    parts = grid(lens, heads=True)
    exact = patch_words(lens, CASES[:1], brightness, parts, options=OPTIONS)
    fast = attribute_patching(lens, CASES[:1], brightness, options=OPTIONS).of(parts)
    pearson, spearman = correlation(fast[:, 0], exact.changed[:, 0] - exact.base[0])
    assert pearson > 0.8
    assert spearman > 0.7


def test_a_metric_without_a_gradient_is_refused() -> None:
    with pytest.raises(mm.InputError, match="without a gradient"):
        attribute_patching(model(), CASES[:1], by_rule(lambda array: float(array.mean())), options=OPTIONS)


def test_mistakes_are_refused_before_anything_runs() -> None:
    built = tiny.stable_diffusion()
    lens = mm.HookedModel(built.model)
    built.model.unet.forward = lambda *a, **k: pytest.fail("it ran")
    with pytest.raises(mm.WordNotFoundError, match="a, big, cat"):
        patch_words(lens, [Case("a big cat", "dog", "a red cat", "red")], brightness, options=OPTIONS)
    with pytest.raises(mm.WordNotFoundError, match="a, big, cat"):
        knock_out_words(lens, [Case("a big cat", "dog")], brightness, options=OPTIONS)
    with pytest.raises(mm.InputError, match="no other one"):
        patch_words(lens, [Case("a big cat", "big")], brightness, options=OPTIONS)
    with pytest.raises(mm.InputError, match="do not attend to text"):
        patch_words(lens, CASES, brightness, [Part(layers=(9,))], options=OPTIONS)
    with pytest.raises(mm.InputError, match="at least one case"):
        patch_words(lens, [], brightness, options=OPTIONS)
    with pytest.raises(mm.InputError, match="seed"):
        patch_words(lens, CASES, brightness, options=OPTIONS | {"seed": 1})
    with pytest.raises(mm.InputError, match="steps 0 to 2"):
        patch_words(lens, CASES, brightness, [Part(steps=(2, 3))], options=OPTIONS)
    with pytest.raises(mm.InputError, match="window of 9"):
        grid(lens, layers=9)


def test_a_metric_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(mm.InputError, match="one number for each"):
        patch_words(model(), CASES[:1], lambda images: images.mean(), options=OPTIONS)
    with pytest.raises(mm.InputError, match="not a number"):
        patch_words(model(), CASES[:1], lambda images: brightness(images) / 0 * 0, options=OPTIONS)


def test_words_of_other_lengths_are_aligned() -> None:
    lens = model()
    own, other = (lens.prompt_layout("text", [p]) for p in ("a big cat", "a tiger cat"))
    ours, theirs = align_positions(own, other, "big", "tiger", "after")
    assert ours == list(range(2, 16))
    # Three tokens over five, then what follows is shifted by two; the last stays the last.
    assert theirs == [2, 4, 6, *range(7, 16), 15, 15]
    assert positions_of_word(own, "big", "cat") == [2, 3, 4, 5, 6, 7]
    with pytest.raises(mm.InputError, match="comes before"):
        positions_of_word(own, "cat", "big")


def record(changed: Tensor, base: Tensor, goal: Tensor) -> Effects:
    every, named = ((),) * len(changed), ("turned",) * len(base)
    return Effects(
        changed, base, goal, changed * 0, every, every, every, "", "", named, (False,) * len(changed)
    )


def test_intervals_cover_a_known_mean() -> None:
    covered = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        base, goal = torch.zeros(30), torch.ones(30)
        changed = 0.5 + 0.2 * torch.randn(1, 30, generator=generator)
        share = record(changed, base, goal).share(draws=400)
        covered += float(share.low) <= 0.5 <= float(share.high)
    assert covered >= 33
    assert math.isclose(float(share.mean), float(changed.mean()), rel_tol=1e-6)
    with pytest.raises(mm.InputError, match="no scale"):
        record(changed, base, base).share()


def test_steps_are_grouped_as_equally_as_can_be() -> None:
    assert step_groups(10, 3) == ((0, 1, 2), (3, 4, 5, 6), (7, 8, 9))
    assert [len(g) for g in step_groups(20, 4)] == [5, 5, 5, 5]
