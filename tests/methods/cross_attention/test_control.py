"""Edits by words: what Hertz et al. say, by plain matrices; identities bit for bit; the right mapper."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.cross_attention import (
    LocalBlend,
    WordEdit,
    bind_attributes,
    binding_loss,
    edit_words,
    word_maps,
)
from methods_multimodal.cross_attention.alignment import refining, replacing, weights

SIZE: dict[str, Any] = {"height": 16, "width": 24, "guidance_scale": 3.0}


def model() -> mm.HookedModel:
    return mm.HookedModel(tiny.stable_diffusion().model)


def layout(prompt: str) -> mm.TokenLayout:
    return model().prompt_layout("text", [prompt])


def plain(lens: mm.HookedModel, prompts: list[str], n_steps: int = 3, **run: Any) -> Tensor:
    inputs = {**SIZE, "prompt": prompts, "seed": [0] * len(prompts), "output_type": "pt"}
    return lens.run({**inputs, "num_inference_steps": n_steps}, **run).output.images


def test_every_token_after_a_longer_word_is_read_from_its_own_column() -> None:
    # a=1 red=2-4 cat=5-7 end=8 | a=1 pinkish=2-8 cat=9-11 end=12
    found = replacing(layout("a red cat"), layout("a pinkish cat"))
    assert found[1, 1] == 1
    torch.testing.assert_close(found[2:5, 2:9], torch.full((3, 7), 1 / 7))
    for source, target in ((5, 9), (6, 10), (7, 11), (8, 12), (9, 13), (11, 15)):
        assert found[source, target] == 1
        assert found[:, target].sum() == 1
    # A word keeps the attention that its predecessor had.
    attention = torch.rand(5, 16)
    torch.testing.assert_close((attention @ found)[:, 2:9].sum(1), attention[:, 2:5].sum(1))
    assert torch.equal(replacing(layout("a red cat"), layout("a big cat")), torch.eye(16))
    with pytest.raises(mm.InputError, match="refine"):
        replacing(layout("a cat"), layout("a red cat"))


def test_new_words_have_no_source_and_old_ones_keep_theirs() -> None:
    found, has = refining(layout("a cat"), layout("a red cat"))
    assert has.tolist() == [True, True, *[False] * 3, *[True] * 11]
    assert [int(found[:, t].argmax()) for t in (1, 5, 6, 7, 8)] == [1, 2, 3, 4, 5]
    assert found[:, 2:5].sum() == 0
    found, has = refining(layout("a red cat"), layout("cat"))
    assert bool(has.all())
    assert [int(found[:, t].argmax()) for t in (1, 2, 3, 4)] == [5, 6, 7, 8]


def test_weights_are_of_words() -> None:
    assert weights(layout("a red cat"), {"red": 2.0}).tolist() == [1, 1, 2, 2, 2, *[1] * 11]
    with pytest.raises(mm.WordNotFoundError, match="a, red, cat"):
        weights(layout("a red cat"), {"dog": 2.0})
    with pytest.raises(mm.InputError, match="negative"):
        weights(layout("a red cat"), {"red": -1.0})


def test_replacing_gives_the_target_the_sources_attention_by_hand() -> None:
    lens = model()
    pictures = edit_words(
        lens, "a red cat", [WordEdit("a pinkish cat", "replace", cross=0.5, own=0.5)], n_steps=3, options=SIZE
    )
    mapper = replacing(layout("a red cat"), layout("a pinkish cat"))

    def cross(value: Tensor) -> Tensor:
        return torch.stack([value[0], value[0] @ mapper])

    crossed = [s.name for s in lens.sites("denoiser.*cross_attn.hook_pattern")]
    own = [s.name for s in lens.sites("denoiser.*.attn.hook_pattern")]
    # Half of three steps: two of the words' (their table has a row more), one of the pixels'.
    edits = [mm.Edit(n, cross, rows="cond", steps=[0, 1]) for n in crossed]
    edits += [mm.Edit(n, lambda v: torch.stack([v[0], v[0]]), rows="cond", steps=[0]) for n in own]
    slow = plain(lens, ["a red cat", "a pinkish cat"], edit=edits)
    torch.testing.assert_close(pictures, slow)
    alone = plain(lens, ["a red cat", "a pinkish cat"])
    torch.testing.assert_close(pictures[0], alone[0])
    assert not torch.allclose(pictures[1], alone[1], atol=1e-4)


@pytest.mark.parametrize(
    "edit",
    [
        WordEdit("a red cat", None, own=0.0, weights={"red": 1.0}),
        WordEdit("a red cat", "replace", cross=1.0, own=1.0),
        WordEdit("a red cat", "refine", cross={"default": 0.5, "cat": 1.0}, own=0.0, weights={"cat": 1.0}),
        WordEdit("a big cat", "replace", cross=0.0, own=0.0),
    ],
)
def test_an_edit_that_changes_nothing_is_the_identity_bit_for_bit(edit: WordEdit) -> None:
    lens = model()
    found = edit_words(lens, "a red cat", [edit], n_steps=3, options=SIZE)
    assert torch.equal(found, plain(lens, ["a red cat", edit.prompt]).float())


def test_reweighting_turns_the_attention_to_a_word_up_and_down() -> None:
    lens = model()
    given = [WordEdit("a red cat", None, own=0.0, weights={"cat": w}) for w in (0.0, 0.5, 1.0, 2.0, 4.0)]
    found = edit_words(lens, "a red cat", given, n_steps=3, options=SIZE)
    apart = (found[1:] - found[0]).square().mean((1, 2, 3)).sqrt()
    assert apart[2] == 0
    assert apart[0] > apart[1] > 0
    assert apart[4] > apart[3] > 0


def test_words_may_have_a_share_of_the_steps_of_their_own() -> None:
    lens = model()
    mapper = replacing(layout("a red cat"), layout("a big dog"))
    edit = WordEdit("a big dog", "replace", cross={"default": 0.0, "dog": 1.0}, own=0.0)
    found = edit_words(lens, "a red cat", [edit], n_steps=2, options=SIZE)

    def cross(value: Tensor) -> Tensor:
        new = value.clone()
        new[1][..., 5:8] = (value[0] @ mapper)[..., 5:8]
        return new

    sites = [s.name for s in lens.sites("denoiser.*cross_attn.hook_pattern")]
    slow = plain(lens, ["a red cat", "a big dog"], 2, edit=[mm.Edit(n, cross, rows="cond") for n in sites])
    torch.testing.assert_close(found, slow)


def test_outside_of_the_blended_words_the_latents_are_the_sources() -> None:
    lens = model()
    everything = WordEdit("a red dog", "replace", blend=LocalBlend(("dog",), threshold=1.0, start=0.0))
    found = edit_words(lens, "a red cat", [everything], n_steps=3, options=SIZE)
    # Nothing is above its own maximum: all of it is outside.
    torch.testing.assert_close(found[1], found[0])
    nothing = WordEdit("a red dog", "replace", blend=LocalBlend(("dog",), threshold=-1.0, start=0.0))
    bare = WordEdit("a red dog", "replace")
    one, two = (edit_words(lens, "a red cat", [e], n_steps=3, options=SIZE) for e in (nothing, bare))
    torch.testing.assert_close(one, two)
    with pytest.raises(mm.WordNotFoundError):
        edit_words(lens, "a red cat", [WordEdit("a red dog", None, blend=LocalBlend(("fish",)))], n_steps=2)


def test_mistakes_are_refused() -> None:
    lens = model()
    with pytest.raises(mm.InputError, match="'replace' or 'refine'"):
        edit_words(lens, "a cat", [WordEdit("a dog", "swap")], n_steps=2)
    with pytest.raises(mm.InputError, match="share of the steps"):
        edit_words(lens, "a cat", [WordEdit("a dog", "replace", cross=1.5)], n_steps=2)
    with pytest.raises(mm.InputError, match="at least one WordEdit"):
        edit_words(lens, "a cat", [], n_steps=2)


def test_the_binding_loss_is_least_where_pairs_agree() -> None:
    left, right = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.1, 0.7])
    kl = float((left * (left / right).log()).sum() + (right * (right / left).log()).sum()) / 2
    bound = binding_loss(torch.stack([left, left, right, right]), [(0, 1), (2, 3)])
    torch.testing.assert_close(bound, torch.tensor(-kl))
    crossed = binding_loss(torch.stack([left, right, left, right]), [(0, 1), (2, 3)])
    # Within a pair all of it; of the words outside, one agrees with each of the pair's.
    torch.testing.assert_close(crossed, torch.tensor(kl - kl / 2))
    assert bound < crossed


def test_binding_brings_the_maps_of_a_pair_together() -> None:
    lens = model()
    pairs = [("red", "cat"), ("big", "dog")]
    prompt = "red cat big dog"
    options = {**SIZE, "num_inference_steps": 4}
    before, _ = word_maps(lens, {**options, "prompt": prompt, "seed": 0, "output_type": "pt"}, keep=())
    free = bind_attributes(lens, prompt, pairs, n_steps=4, rate=0.0, options=SIZE)
    assert torch.equal(free, plain(lens, [prompt], 4).float())
    bound = bind_attributes(lens, prompt, pairs, n_steps=4, until=1.0, rate=20.0, options=SIZE)
    assert not torch.allclose(free, bound, atol=1e-4)
    assert before.words_of() == ("red", "cat", "big", "dog")
    assert not any(m._forward_pre_hooks for m in lens.wrapped.unet.modules())
    with pytest.raises(mm.WordNotFoundError):
        bind_attributes(lens, prompt, [("red", "fish")], n_steps=2)


def test_one_move_goes_downhill() -> None:
    from methods_multimodal.cross_attention.binding import _Mover

    lens = model()
    got = lens.prompt_layout("text", ["red cat"])
    mover = _Mover(lens, [got.where("red"), got.where("cat")], [(0, 1)], 5.0, range(2))
    unet = lens.wrapped.unet
    states = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(0))
    mover.arguments = {"encoder_hidden_states": states}
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))

    def loss(x: Tensor) -> float:
        patterns = {}
        read = [mm.Read(a.site("pattern")) for a in mover.attention]
        inputs = {"sample": x, "timestep": torch.tensor(500), "encoder_hidden_states": states}
        run = mover.denoiser.run(inputs, read=read)
        patterns = {r.site: run[r.site] for r in read}
        return float(binding_loss(mover._maps(patterns), mover.pairs))

    moved = mover.moved(latents, lens.wrapped.scheduler, torch.tensor(500))
    assert loss(moved) < loss(latents)
    assert unet.training is False
