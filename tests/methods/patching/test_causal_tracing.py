"""Tracing: laws that hold exactly, corruption of one thing only, and heads against plain sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.patching import (
    Corruption,
    answer_log_prob,
    answer_logits,
    averaged,
    head_importance,
    noised,
    other_pictures,
    other_words,
    patch_positions,
    position_importance,
    register_positions,
    resampled,
    token_roles,
    trace,
)
from methods_multimodal.patching.roles import outliers
from mm_adapters import StoreError
from mm_adapters.zoo import measures, questions, world
from tests.methods.contract.families import family

SCENES = [world.scene(i, "test", 3, kind="one") for i in range(3)]


@pytest.fixture(scope="module")
def llava() -> mm.HookedModel:
    return mm.load("tiny-llava")


def asked(scenes: list[world.Scene]) -> dict[str, Any]:
    prompt = questions.Question("shape", "what shape is it?", "").prompt()
    return {"text": [prompt] * len(scenes), "images": measures.images_of(scenes)}


def no_run(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a run")


def last_logit(output: Any) -> Tensor:
    return output.logits[:, -1, 100].float()


def everything(roles: Any) -> dict[str, Tensor]:
    return {"all": torch.ones_like(next(iter(roles.masks.values())))}


# ---- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["clean", "corrupted"])
def test_all_nodes_patched_is_the_other_run_and_the_run_itself_moves_nothing(
    llava: mm.HookedModel, into: str
) -> None:
    clean = asked(SCENES)
    pair = other_pictures(llava, clean, asked([world.scene(i, "test", 4, kind="one") for i in range(3)]))
    roles = token_roles(llava, clean)
    found = trace(llava, clean, pair, last_logit, everything(roles), into=into)
    whole = found.clean if into == "corrupted" else found.corrupted
    assert torch.equal(found.patched, whole[:, None, None].expand_as(found.patched))
    assert torch.equal(found.share().mean, torch.ones(4, 1))
    null = trace(llava, clean, Corruption(clean), last_logit, everything(roles), into=into)
    assert null.effect.abs().max() == 0
    with pytest.raises(mm.InputError, match="same in both runs"):
        null.share()


def test_the_block_behind_the_feature_layer_is_dead_and_those_before_it_are_not(
    llava: mm.HookedModel,
) -> None:
    clean = asked(SCENES)
    pair = other_pictures(llava, clean, asked([SCENES[1], SCENES[2], SCENES[0]]))
    roles = everything(token_roles(llava, clean, tower="vision"))
    found = trace(llava, clean, pair, last_logit, roles, tower="vision", part="hook_mlp_out")
    assert found.effect[:, 3].abs().max() == 0
    assert found.effect[:, :3].abs().min() > 0
    state = trace(llava, clean, pair, last_logit, roles, tower="vision", part="hook_resid_post")
    assert state.effect[:, 3].abs().max() == 0
    assert torch.equal(state.patched[:, 2, 0], state.clean)


def test_single_positions_equal_activation_patching() -> None:
    case = tiny.CASES["llava"]()
    model = mm.HookedModel(case.model)
    corrupted = case.inputs | {"pixel_values": case.inputs["pixel_values"].flip(0)}

    def metric(output: Any) -> Tensor:
        return output.logits[:, -1, 3]

    roles = {str(i): torch.eye(10, dtype=torch.bool)[[i, i]] for i in (1, 2, 9)}
    found = trace(model, case.inputs, other_pictures(model, case.inputs, corrupted), metric, roles)
    units = [(1,), (2,), (9,)]
    n_layers = model.towers["language"].n_layers()
    old = patch_positions(
        model, case.inputs, corrupted, metric, tower="language", layers=range(n_layers), units=units
    )
    torch.testing.assert_close(found.patched, old.patched, rtol=1e-5, atol=1e-6)


def test_a_window_is_the_edits_of_its_layers_together() -> None:
    case = tiny.CASES["llava"]()
    model = mm.HookedModel(case.model)
    corrupted = case.inputs | {"pixel_values": case.inputs["pixel_values"].flip(0)}
    pair = other_pictures(model, case.inputs, corrupted)
    roles = {"two": torch.arange(10).expand(2, 10) % 5 == 1}

    def metric(output: Any) -> Tensor:
        return output.logits[:, -1, 3]

    settings: dict[str, Any] = {"part": "hook_mlp_out", "layers": [0], "window": 2, "into": "clean"}
    found = trace(model, case.inputs, pair, metric, roles, **settings)
    sites = [f"language.blocks.{i}.hook_mlp_out" for i in (0, 1)]
    donor = model.run(corrupted, read=sites)

    def put(site: str) -> Any:
        def write(value: Tensor) -> Tensor:
            value = value.clone()
            value[:, [1, 6]] = donor[site][:, [1, 6]]
            return value

        return write

    run = model.run(case.inputs, edit=[mm.Edit(site, put(site)) for site in sites])
    torch.testing.assert_close(found.patched[:, 0, 0], metric(run.output))
    assert found.windows == ((0, 1),)


def test_a_model_like_blip_is_traced_from_its_image_through_its_text_tower() -> None:
    case = tiny.CASES["blip_vqa"]()
    model = mm.HookedModel(case.model)

    def loss(output: Any) -> Tensor:
        return output.loss.float().expand(2)

    image = torch.ones(2, 5, dtype=torch.bool)
    noise = noised(model, case.inputs, image, site="vision.hook_embed", scale=3.0)
    roles = {"all": torch.ones(2, 4, dtype=torch.bool)}
    # The answer reads nothing but the text tower's last states; before that its layers read the image again.
    last = trace(model, case.inputs, noise, loss, roles, tower="text", part="hook_resid_post")
    assert torch.equal(last.patched[:, -1, 0], last.clean)
    assert not torch.allclose(last.clean, last.corrupted)
    first = trace(model, case.inputs, noise, loss, roles, tower="text", part="hook_resid_pre", layers=[0])
    assert first.effect.abs().max() == 0


def test_a_trace_that_was_stopped_goes_on_and_other_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = family("llava")
    model, folder = case.model("hooked"), tmp_path / "work"
    roles = token_roles(model, case.inputs)

    def metric(output: Any) -> Tensor:
        return output.logits[:, -1, 3]

    noise = noised(model, case.inputs, roles["image"], site="language.hook_embed")
    whole = trace(model, case.inputs, noise, metric, roles)
    run, left = model.run, [7]

    def stopping(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    monkeypatch.setattr(model, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        trace(model, case.inputs, noise, metric, roles, folder=folder)
    left[0] = 2 + whole.patched[0].numel() - 5
    assert torch.equal(trace(model, case.inputs, noise, metric, roles, folder=folder).patched, whole.patched)
    left[0] = 99
    with pytest.raises(StoreError, match="differ"):
        trace(model, case.inputs, noise, metric, roles, folder=folder, into="clean")
    loaded = type(whole).load(whole.save(tmp_path / "trace.safetensors"))
    assert torch.equal(loaded.share().low, whole.share().low)


# ---- corruption ----------------------------------------------------------------------------------


def test_noise_has_the_deviation_it_says_and_only_where_it_says(llava: mm.HookedModel) -> None:
    clean, site = asked(SCENES), "language.hook_embed"
    image = token_roles(llava, clean)["image"]
    noise = noised(llava, clean, image, site=site, scale=2.0)
    before, after = (llava.run(clean, read=[site], edit=edit)[site] for edit in ((), noise.edits))
    moved = after - before
    assert moved[~image].abs().max() == 0
    assert float(moved[image].std() / before[image].std()) == pytest.approx(2.0, rel=0.02)
    again = llava.run(clean, read=[site], edit=noised(llava, clean, image, site=site, scale=2.0).edits)[site]
    assert torch.equal(after, again)


def test_means_and_other_rows_are_what_they_say(llava: mm.HookedModel) -> None:
    clean, site = asked(SCENES), "language.hook_embed"
    image = token_roles(llava, clean)["image"]
    before = llava.run(clean, read=[site])[site]
    mean = llava.run(clean, read=[site], edit=averaged(llava, clean, image, site=site).edits)[site]
    torch.testing.assert_close(mean[image], before[image].mean(0).expand_as(mean[image]))
    one = asked(SCENES[:1])
    of_one = averaged(llava, clean, image, site=site, reference=(one, image[:1]))
    mean = llava.run(clean, read=[site], edit=of_one.edits)[site]
    torch.testing.assert_close(mean[1, 5], before[0][image[0]].mean(0))
    for seed in range(4):
        changed = llava.run(
            clean, read=[site], edit=resampled(llava, clean, image, site=site, seed=seed).edits
        )[site]
        sources = [
            [other for other in range(3) if torch.equal(changed[row, 1:65], before[other, 1:65])]
            for row in range(3)
        ]
        assert sorted(one for of in sources for one in of) == [0, 1, 2]
        assert all(row not in of for row, of in enumerate(sources))
    with pytest.raises(mm.InputError, match="there is one row"):
        resampled(llava, one, image[:1], site=site)
    with pytest.raises(
        mm.InputError, match=r"language\.hook_embed is \[3, \d+, \.\.\.\]; the mask is \[3, 5\]"
    ):
        noised(llava, clean, image[:, :5], site=site)


def test_pairs_that_differ_in_more_than_one_thing_are_refused_before_a_run(llava: mm.HookedModel) -> None:
    clean, run = asked(SCENES), llava.run
    longer = [clean["text"][0].replace("shape", "colour or shape"), *clean["text"][1:]]
    both = asked(SCENES[::-1]) | {"text": [t.replace("shape", "colour") for t in clean["text"]]}
    llava.run = no_run
    try:
        with pytest.raises(
            mm.InputError, match="differ in input_ids and pixel_values, and here only the pictures"
        ):
            other_pictures(llava, clean, both)
        with pytest.raises(mm.InputError, match="differ in size: input_ids is"):
            other_words(llava, clean, clean | {"text": longer})
        with pytest.raises(mm.InputError, match="The two inputs are the same: the text should differ"):
            other_words(llava, clean, clean)
        twice = [t.replace("what", "the").replace("it?", "the?") for t in clean["text"]]
        with pytest.raises(mm.InputError, match=r"Row 0's texts differ at the positions \[\d+, \d+\]"):
            other_words(llava, clean, clean | {"text": twice})
        prepared = llava.prepare(**clean)
        wide = prepared | {"pixel_values": torch.zeros(3, 3, 64, 80)}
        with pytest.raises(mm.InputError, match=r"pixel_values is \(3, 3, 64, 64\) and \(3, 3, 64, 80\)"):
            other_pictures(llava, prepared, wide)
        padded = prepared | {"attention_mask": prepared["attention_mask"].roll(1) * 0 + 1}
        padded["attention_mask"][0, 0] = 0
        with pytest.raises(mm.InputError, match="differ in attention_mask, which says what stands where"):
            other_words(llava, prepared, padded)
    finally:
        llava.run = run
    pair = other_words(llava, clean, clean | {"text": [t.replace("shape", "colour") for t in clean["text"]]})
    assert pair.positions is not None
    assert pair.positions.sum(1).tolist() == [1, 1, 1]
    found = trace(llava, clean, pair, last_logit, {"word": pair.positions})
    # At the first layer the word's own states are all that differs.
    assert torch.equal(found.patched[:, 0, 0], found.clean)


# ---- roles ---------------------------------------------------------------------------------------


def test_objects_are_the_patches_that_their_pixels_touch(llava: mm.HookedModel) -> None:
    clean = asked(SCENES)
    masks = torch.from_numpy(np.array([world.masks(scene)[0] for scene in SCENES]))
    roles = token_roles(llava, clean, objects=masks, words=["shape"])
    for row in range(3):
        cells = masks[row].reshape(8, 8, 8, 8).any(3).any(1)
        assert torch.equal(roles["object"][row, 1:65].reshape(8, 8), cells)
        grown = torch.nn.functional.max_pool2d(cells[None].float(), 3, 1, 1)[0] > 0
        assert torch.equal(roles["buffer"][row, 1:65].reshape(8, 8), grown & ~cells)
    assert torch.equal(roles["object"] | roles["buffer"] | roles["background"], roles["image"])
    assert roles["last"].sum() == 3
    assert not (roles["question"] & (roles["image"] | roles["last"])).any()
    control = roles.matched("object", "background", seed=1)
    assert torch.equal(control.sum(1), roles["object"].sum(1))
    assert not (control & ~roles["background"]).any()
    with pytest.raises(mm.InputError, match="no role 'thing' here; there is image, object"):
        _ = roles["thing"]
    with pytest.raises(mm.InputError, match="touches no patch of image 0: it covers 0 pixels"):
        token_roles(llava, clean, objects=torch.zeros(3, 8, 8, dtype=torch.bool))
    vision = token_roles(llava, clean, tower="vision", objects=masks)
    assert torch.equal(vision["object"][:, -64:], roles["object"][:, 1:65])


def test_a_planted_register_is_found(llava: mm.HookedModel) -> None:
    lengths = torch.ones(2, 9) + torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) * 0.1
    lengths[0, 4], lengths[1, 0] = 5.0, 50.0
    among = torch.ones(2, 9, dtype=torch.bool)
    among[:, 0] = False
    assert outliers(lengths, among, 2.5).nonzero().tolist() == [[0, 4]]
    clean = asked(SCENES)
    found, image = register_positions(llava, clean, above=1.0), token_roles(llava, clean)["image"]
    assert found.any()
    assert not (found & ~image).any()


# ---- heads ---------------------------------------------------------------------------------------


def test_heads_and_positions_raise_the_answer_as_sums_by_hand_say() -> None:
    case = tiny.CASES["llama_lm"]()
    hf, model, ids = case.model, mm.HookedModel(case.model), [7, 11]
    found = head_importance(model, case.inputs, ids)
    heads = [(1, 2), (0, 3)]
    by_position = position_importance(model, case.inputs, ids, heads)
    d = hf.config.head_dim or hf.config.hidden_size // hf.config.num_attention_heads
    group = hf.config.num_attention_heads // hf.config.num_key_value_heads
    assert group > 1
    with torch.no_grad():
        states = hf.model(**case.inputs, output_hidden_states=True).hidden_states
        for layer in range(hf.config.num_hidden_layers):
            block = hf.model.layers[layer]
            normed = block.input_layernorm(states[layer])
            pattern = model.run(case.inputs, read=[f"language.blocks.{layer}.attn.hook_pattern"])
            weights = pattern[f"language.blocks.{layer}.attn.hook_pattern"][:, :, -1]
            v = block.self_attn.v_proj(normed)
            for head in range(hf.config.num_attention_heads):
                mine = v[:, :, head // group * d : (head // group + 1) * d]
                out = block.self_attn.o_proj.weight[:, head * d : (head + 1) * d]
                parts = (weights[:, head, :, None] * mine) @ out.T
                state = states[layer][:, -1]
                for row in range(2):

                    def said(x: Tensor, row: int = row) -> Tensor:
                        return hf.lm_head(hf.model.norm(x)).log_softmax(-1)[..., ids[row]]

                    rise = said(state[row] + parts[row].sum(0)) - said(state[row])
                    torch.testing.assert_close(found.increase[row, layer, head], rise, rtol=1e-4, atol=1e-5)
                    if (layer, head) in heads:
                        rises = said(state[row] + parts[row]) - said(state[row])
                        got = by_position.increase[row, heads.index((layer, head))]
                        torch.testing.assert_close(got, rises, rtol=1e-4, atol=1e-5)
    first = found.top(1)[0]
    assert found.increase.mean(0)[first] == found.increase.mean(0).max()


def test_metrics_read_each_rows_last_attended_position() -> None:
    case = tiny.CASES["llava"]()
    model = mm.HookedModel(case.model)
    attended = case.inputs["attention_mask"].clone()
    attended[1, -2:] = 0
    inputs = case.inputs | {"attention_mask": attended}
    output = model.run(inputs).output
    gap = answer_logits(model, inputs, [3, 4], [5, 6])(output)
    expected = [
        output.logits[0, 9, 3] - output.logits[0, 9, 5],
        output.logits[1, 7, 4] - output.logits[1, 7, 6],
    ]
    torch.testing.assert_close(gap, torch.stack(expected))
    log_prob = answer_log_prob(model, inputs, [3, 4])(output)
    torch.testing.assert_close(log_prob[1], output.logits[1, 7].log_softmax(-1)[4])
    with pytest.raises(mm.InputError, match="3 tokens for 2 rows"):
        answer_log_prob(model, inputs, [1, 2, 3])(output)
    with pytest.raises(mm.InputError, match=r"tokens: \[999\] tokens; there are the numbers 0 to"):
        answer_log_prob(model, inputs, [1, 999])
    for wrong, message in (([(0, 9)], "layer 0 has no head 9"), ([], "there are none")):
        with pytest.raises(mm.InputError, match=message):
            position_importance(model, inputs, [1, 2], wrong)
