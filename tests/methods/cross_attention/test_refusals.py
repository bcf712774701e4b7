"""Words, rows and layers that are not there, beside those that are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F

import mm_adapters as mm
from methods_multimodal.cross_attention import Case, attribute_patching, bind_attributes
from methods_multimodal.cross_attention._recipes import index_of, make, need
from methods_multimodal.cross_attention._rows import copy_positions, copy_row, generate, picture_for_each
from methods_multimodal.cross_attention._sites import text_reader
from methods_multimodal.cross_attention.binding import _conditional
from methods_multimodal.cross_attention.neurons import first_noise
from methods_multimodal.cross_attention.restoring import _AtWord
from methods_multimodal.cross_attention.word_reader import _shown
from mm_adapters import InputError, WordNotFoundError

OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def model() -> mm.HookedModel:
    return mm.HookedModel(tiny.stable_diffusion().model)


def _record(stages: dict[str, tuple[str, ...]], latent: tuple[int, int] = (32, 32), **more: Any) -> Any:
    """Maps [step, layer, head, image, word, row, column] of two steps, two heads, an image, three words."""
    g = torch.Generator().manual_seed(0)
    by_grid = {}
    for grid, layers in stages.items():
        height, width = map(int, grid.split("x"))
        by_grid[grid] = torch.rand(2, len(layers), 2, 1, 3, height, width, generator=g)
    return SimpleNamespace(
        by_grid=by_grid,
        stages=tuple(stages.values()),
        n_tokens=((1, 2),),
        latent=latent,
        n_steps=2,
        n_images=1,
        all_words={},
        affinity=torch.zeros(0),
        affinity_grid=(0, 0),
        prompt_of=lambda image: 0,
        **more,
    )


def test_daam_s_recipe_leaves_out_the_middle_and_an_eighth() -> None:
    record = _record({"8x8": ("down", "mid", "up"), "4x4": ("down",)})
    kept = record.by_grid["8x8"][:, [0, 2]].sum(0).flatten(0, 1)[:, 0]  # [layer and head, word, ...]
    sized = F.interpolate(kept, size=(32, 32), mode="bicubic").clamp(min=0)
    wanted = sized.mean(0, keepdim=True) / torch.tensor([1, 2, 1])[:, None, None]
    torch.testing.assert_close(make(record, "daam", slice(None), None), wanted)
    torch.testing.assert_close(make(record, "daam", slice(None), "8x8"), wanted)
    for grid, other in (("4x4", record), ("8x8", _record({"8x8": ("mid",)}))):
        with pytest.raises(InputError, match=r"^daam's recipe takes no layer of this resolution\.$"):
            make(other, "daam", slice(None), grid)


def test_a_recipe_s_layers_steps_and_words_are_those_that_are_kept() -> None:
    record = _record({"8x8": ("down",), "4x4": ("up",)})
    with pytest.raises(InputError, match=r"^No recipe 'sum'; there is .*daam"):
        make(record, "sum", slice(None), None)
    with pytest.raises(InputError, match=r"^No layer of the resolution '2x2'; there is 8x8, 4x4\.$"):
        make(record, "mean", slice(None), "2x2")
    first = make(record, "mean", slice(0, 1), "8x8")
    wanted = record.by_grid["8x8"][0].mean((0, 1))
    torch.testing.assert_close(first, F.interpolate(wanted, size=(32, 32), mode="bilinear"))
    averaged = _record({"8x8": ("down",)})
    averaged.by_grid = {"8x8": record.by_grid["8x8"].mean((0, 2), keepdim=True)}
    for axis in ("step", "head"):
        need(record, axis)
        with pytest.raises(InputError, match=rf"averaged over the {axis}s\. .* keep=\('{axis}',\)"):
            need(averaged, axis)
    make(averaged, "mean", slice(None), None)
    with pytest.raises(InputError, match="averaged over the steps"):
        make(averaged, "mean", slice(0, 1), None)
    assert [index_of(w, ("A", "cat")) for w in ("a", "CAT")] == [0, 1]
    with pytest.raises(WordNotFoundError, match=r"^There is no map of 'dog'\. .* A, cat\.$"):
        index_of("dog", ("A", "cat"))


def test_a_row_is_copied_whole_or_by_its_heads() -> None:
    rows = torch.randn(2, 3, 4, 5)
    assert torch.equal(copy_row(1)(rows[0].clone(), rows), rows[1])
    found = copy_row(1, heads=(0, 2))(rows[0].clone(), rows)
    assert torch.equal(found[:, [0, 2]], rows[1][:, [0, 2]])
    assert torch.equal(found[:, [1, 3]], rows[0][:, [1, 3]])
    found = copy_positions(1, (0, 2, 3), (1, 0, 1), heads=(3,))(rows[0].clone(), rows)  # There is no 3.
    wanted = rows[0].clone()
    wanted[0, 3], wanted[2, 3] = rows[1][1, 3], rows[1][0, 3]
    assert torch.equal(found, wanted)


def test_one_picture_is_every_prompt_s() -> None:
    one = torch.randn(1, 3, 2, 2)
    assert torch.equal(picture_for_each({"image": one}, 2)["image"], torch.cat([one, one]))
    two = torch.cat([one, -one])
    assert torch.equal(picture_for_each({"image": two}, 2)["image"], two)
    other = {"image": torch.zeros(3, 2, 2), "image_embeds": None, "strength": torch.zeros(5, 2)}
    assert picture_for_each(other, 2) == other
    for n in (2, 4):
        with pytest.raises(InputError, match=f"^image_embeds holds {n} pictures for 3 prompts: give one"):
            picture_for_each({"image_embeds": torch.zeros(n, 6)}, 3)


def test_pictures_have_a_seed_each_and_are_finite(model: mm.HookedModel) -> None:
    assert generate(model, ["a"], [0], options=OPTIONS).shape == (1, 3, 16, 16)
    for seeds in ([], [0, 1]):
        with pytest.raises(InputError, match=f"^1 prompts and {len(seeds)} seeds: give a seed for each"):
            generate(model, ["a"], seeds, options=OPTIONS)
    broken = tiny.stable_diffusion().model
    torch.nn.init.constant_(broken.vae.decoder.conv_out.bias, float("nan"))
    with pytest.raises(InputError, match=r"^A picture holds NaN: a step broke down"):
        generate(mm.HookedModel(broken), ["a"], [0], options=OPTIONS)


def test_the_words_are_the_first_encoder_s_where_none_is_called_text(model: mm.HookedModel) -> None:
    assert text_reader(model) == "text"
    fake: Any = SimpleNamespace(
        towers={name: SimpleNamespace(role=role) for name, role in (
            ("denoiser", "denoiser"), ("text_2", "text"), ("text_3", "text"))}
    )  # fmt: skip
    assert text_reader(fake) == "text_2"


def test_patching_takes_another_prompt(model: mm.HookedModel) -> None:
    with pytest.raises(
        InputError, match=r"^Patching takes two prompts; the case 'a dog' has no other one\.$"
    ):
        attribute_patching(
            model, [Case("a cat", "cat", "a dog", "dog"), Case("a dog", "dog")], lambda x: x.mean((1, 2, 3))
        )


@pytest.mark.parametrize(
    ("pairs", "more"),
    [([], {}), ([("red", "cat")], {"n_steps": 0}), ([("red", "cat")], {"until": -0.01}),
     ([("red", "cat")], {"until": 1.01})],
)  # fmt: skip
def test_binding_takes_pairs_steps_and_a_share(model: mm.HookedModel, pairs: Any, more: Any) -> None:
    told = r"^Binding takes at least one pair of words, one step, and until in 0\.\.1\.$"
    with pytest.raises(InputError, match=told):
        bind_attributes(model, "a red cat", pairs, **{"n_steps": 1} | more)
    size = {"height": 16, "width": 16}
    for until in (0.0, 1.0):
        pairs = [("red", "cat")]
        found = bind_attributes(model, "a red cat", pairs, n_steps=1, until=until, rate=0.0, options=size)
        assert found.shape == (1, 3, 16, 16)


def test_a_call_s_rows_under_the_prompt_are_cut_out_of_all_it_is_given() -> None:
    rows = torch.arange(4.0)[:, None]
    given = {
        "states": rows, "more": {"ids": rows + 4, "kept": torch.zeros(3), "size": (8, 8)},
        "none": None, "number": torch.tensor(4.0), "flag": True,
    }  # fmt: skip
    found = _conditional(given, 4, slice(2, 4))
    assert list(found) == ["states", "more", "number", "flag"]
    assert found["states"].flatten().tolist() == [2, 3]
    assert found["more"]["ids"].flatten().tolist() == [6, 7]
    assert (len(found["more"]["kept"]), found["more"]["size"]) == (3, (8, 8))
    assert (float(found["number"]), found["flag"]) == (4, True)


def test_neurons_are_those_of_the_down_and_middle_blocks(model: mm.HookedModel) -> None:
    for layer in (2, 9):
        told = rf"^Layer {layer} has no neurons here; those that do: \[0, 1\]\.$"
        with pytest.raises(InputError, match=told):
            first_noise(model, "a cat", [(0, 1), (layer, 0)], seeds=[0], options=OPTIONS)


def test_a_copy_at_a_word_is_bound_before_it_is_used() -> None:
    with pytest.raises(AssertionError, match="bound to a case first"):
        _AtWord([], "last")(torch.zeros(1), torch.zeros(1, 1))


def test_maps_are_of_the_words_that_are_asked_for(model: mm.HookedModel) -> None:
    layout = model.prompt_layout("text", ["a cat a"])
    assert _shown(None, 0, layout) == ["a", "cat"]
    assert _shown("cat", 0, layout) == ["cat"]
    assert _shown(("cat", "a"), 1, layout) == ["cat", "a"]
    assert _shown([["a"], ["cat"]], 1, layout) == ["cat"]
    tokens = _shown("tokens", 0, layout)
    assert (tokens[0], tokens[1], tokens[-1], len(tokens)) == ("<start>", "a", "<end>", 7)
    for words, prompt in ((None, ""), ([], "a cat"), ([["a"], []], "a cat")):
        with pytest.raises(InputError, match=r"^Prompt 1 has no words, so there are no word maps\.$"):
            _shown(words, 1, model.prompt_layout("text", [prompt]))
