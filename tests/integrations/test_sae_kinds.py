"""SAEs on the three kinds of models: what is collected, what is recovered, and what steering does in each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sae_lens import StandardSAE, StandardSAEConfig
from tiny import CASES

import mm_adapters as mm
from integrations import sae_lens as mm_sae
from mm_adapters import InputError
from mm_adapters.zoo import world


@pytest.fixture(scope="module")
def llava() -> Any:
    return mm.load("tiny-llava")


def sae_at(site: str, d_in: int, d_sae: int = 64) -> Any:
    torch.manual_seed(3)
    made = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae))
    made.cfg.metadata.hook_name = site
    return made


@torch.no_grad()
def perfect(site: str, d_in: int) -> Any:
    """x = relu(x) - relu(-x)."""
    made = sae_at(site, d_in, 2 * d_in)
    eye = torch.eye(d_in)
    made.W_enc.copy_(torch.cat([eye, -eye], 1))
    made.W_dec.copy_(torch.cat([eye, -eye]))
    return made


# ---- collecting ----------------------------------------------------------------------------------


# Where the text stands in the joint sequence, and how many latents there are.
JOINT = {"stable_diffusion_3": "last", "flux": "first"}


@pytest.mark.parametrize("name", JOINT)
def test_text_and_latents_of_a_joint_attention_are_told_apart(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    lens = mm.wrap(case.model)
    prompts = case.inputs["prompt"]
    inputs = {k: v for k, v in case.inputs.items() if k not in ("prompt", "seed")}
    if "negative_prompt" in inputs:
        inputs["negative_prompt"] = "b"
    z, image = "denoiser.blocks.0.attn.hook_z", "denoiser.blocks.0.hook_resid_mid"
    text = "denoiser.blocks.0.hook_text_resid_mid"
    run = lens.run(
        inputs | {"prompt": prompts[:1], "seed": [0]},
        read=[mm.Read(s, rows="cond") for s in (z, image, text)],
    )
    n_text, n_latents = run[text].shape[-2], run[image].shape[-2]
    assert run[z].shape[2] == n_text + n_latents

    def collected(site: str, tokens: str) -> torch.Tensor:
        store = mm_sae.collect(
            lens,
            site,
            prompts[:1],
            tmp_path / f"{tokens}{site}",
            tokens=tokens,
            steps=[1],
            inputs=inputs,
            progress=False,
        )
        return store.rows()[site]

    whole = run[z][1, 0].flatten(1)
    latents, words = whole[:n_latents], whole[n_latents:]
    if JOINT[name] == "first":
        words, latents = whole[:n_text], whole[n_text:]
    torch.testing.assert_close(collected(z, "latent"), latents, rtol=0, atol=1e-5)
    assert torch.equal(collected(image, "latent"), collected(image, "all"))
    assert len(collected(image, "latent")) == n_latents
    told = collected(z, "word")
    layout = lens.layout(text=prompts[:1], **inputs)["denoiser"]
    shift = n_latents if JOINT[name] == "last" else 0
    where = [p - shift for p in layout.positions("word")]
    torch.testing.assert_close(told, words[where], rtol=0, atol=1e-5)
    torch.testing.assert_close(collected(text, "word"), run[text][1, 0][where], rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="no position that is 'word'"):
        collected(image, "word")


def test_of_a_vlm_image_and_word_positions_are_told_apart(llava: Any, tmp_path: Path) -> None:
    pictures = [Image.fromarray(p) for p in world.render_batch([world.scene(i, "test") for i in range(3)])]
    asked = ["what colour is it?", "where is the large red circle?", "how many?"]
    items = [{"text": t, "images": [i]} for t, i in zip(asked, pictures, strict=True)]
    site = "language.blocks.1.hook_resid_post"
    inputs = {"text": asked, "images": [[i] for i in pictures]}
    run = llava.run(inputs, read=[site])
    layout = llava.layout(**inputs)["language"]
    for role in ("image", "word", "pad"):
        rows = mm_sae.collect(llava, site, items, tmp_path / role, tokens=role, progress=False).rows()
        mask = layout.mask(role)
        assert mask.any()
        torch.testing.assert_close(rows[site], run[site][mask].float(), rtol=0, atol=1e-5)
    both = mm_sae.collect(llava, site, items, tmp_path / "both", tokens=["image", "word"], progress=False)
    assert len(both) == int((layout.mask("image") | layout.mask("word")).sum())


def test_past_the_pooling_there_is_one_position_a_row(clip: Any, images: list[Any], tmp_path: Path) -> None:
    site = "vision.ln_final.hook_normalized"
    store = mm_sae.collect(clip, site, images, tmp_path / "s", batch_size=4, progress=False)
    pixels = clip.prepare(images=images)["pixel_values"]
    with torch.no_grad():
        pooled = clip.wrapped.vision_model(pixels).pooler_output
    norm = clip.wrapped.vision_model.post_layernorm
    torch.testing.assert_close(store.rows()[site] * norm.weight + norm.bias, pooled, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=r"one position a row, pooled from .* Pass tokens='all'"):
        mm_sae.collect(clip, site, images, tmp_path / "t", tokens="class", progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_are_stored_as_asked_and_the_manifest_says_what_they_are(
    clip: Any, images: list[Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    site = "vision.blocks.1.hook_resid_post"
    value = clip.run({"images": images[:4], "text": ["."]}, read=[site])[site][:, 0]
    store = mm_sae.collect(
        clip, site, images[:4], tmp_path / "s", tokens="class", dtype=dtype, progress=False
    )
    assert store.columns[site].dtype == dtype
    torch.testing.assert_close(store.rows()[site].float(), value.to(dtype).float(), rtol=1e-2, atol=1e-3)
    about = json.loads((tmp_path / "s" / "manifest.json").read_text())["about"]
    assert about["sites"] == [site]
    assert about["settings"]["tokens"] == ["class"]
    assert about["settings"]["steps"] is None
    other = mm_sae.collect(clip, site, images[1:5], tmp_path / "t", tokens="class", progress=False)
    assert other.about["data"] != about["data"]
    assert other.about["model"] == about["model"]


# ---- evaluating ----------------------------------------------------------------------------------


def test_retrieval_is_recovered_by_a_perfect_sae_and_not_by_zeros(clip: Any) -> None:
    scenes = [
        world.by_hand("white", world.thing(shape, colour))
        for shape in ("circle", "star", "cross")
        for colour in ("red", "green", "blue")
    ]
    pictures = [Image.fromarray(p) for p in world.render_batch(scenes)]
    texts = [f"a {s.things[0].colour} {s.things[0].shape}" for s in scenes]
    site = "vision.blocks.3.hook_resid_post"
    report = mm_sae.evaluate(
        clip, perfect(site, 128), pictures, inputs={"text": texts}, score=mm_sae.retrieval(), batch_size=4
    )
    found = report.recovered
    assert found is not None
    assert found.plain == found.sae >= 0.8
    assert found.zero == pytest.approx(1 / 9)  # One text for all.
    assert found.of_zero == 1
    logits = clip.run({"text": texts, "images": pictures}).output.logits_per_image
    better = (logits > logits.diagonal()[:, None]).sum(-1)
    assert found.plain == pytest.approx(float((better == 0).float().mean()))
    second = mm_sae.retrieval(2)(clip.run({"text": texts, "images": pictures}).output, range(9))
    assert torch.equal(second.bool(), better < 2)


def test_answers_are_recovered_by_a_perfect_sae_and_not_by_zeros(llava: Any) -> None:
    scenes = [world.scene(i, "test", seed=2, kind="one") for i in range(6)]
    pictures = [Image.fromarray(p) for p in world.render_batch(scenes)]
    answers = [s.things[0].colour for s in scenes]
    asked = [f"<image>\nquestion: what colour is the {s.things[0].shape}? answer:" for s in scenes]
    items = [{"text": f"{q} {a}", "images": [i]} for q, a, i in zip(asked, answers, pictures, strict=True)]
    score = mm_sae.answer_likelihood(llava.inputs.tokenizer, answers)
    site = "language.blocks.0.hook_resid_post"
    report = mm_sae.evaluate(
        llava, perfect(site, 128), items, tokens="all", score=score, inputs={}, batch_size=3
    )
    found = report.recovered
    assert found is not None
    # Each answer by itself, token after token.
    alone = 0.0
    for question, answer, picture in zip(asked, answers, pictures, strict=True):
        tokens = llava.inputs.tokenizer(f" {answer}", add_special_tokens=False).input_ids
        whole = llava.run({"text": [f"{question} {answer}"], "images": [[picture]]}).output.logits[0]
        logs = torch.log_softmax(whole.float(), -1)
        alone += sum(float(logs[-1 - len(tokens) + i, t]) for i, t in enumerate(tokens))
    assert found.plain == pytest.approx(alone / 6, rel=1e-3, abs=1e-4)
    assert found.sae == pytest.approx(found.plain, rel=1e-3, abs=1e-4)
    assert found.zero < found.plain - 1
    assert found.of_zero == pytest.approx(1, abs=1e-3)
    assert set(report.by_role) >= {"image", "word"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_are_found_on_whichever_side_texts_are_padded(llava: Any, side: Any) -> None:
    scenes = [world.scene(i, "test", seed=2, kind="one") for i in range(3)]
    pictures = [Image.fromarray(p) for p in world.render_batch(scenes)]
    answers = ["red", "purple", "a blue one on the left"]
    items = [
        {"text": f"<image>\nwhat is it? {a}", "images": [i]} for a, i in zip(answers, pictures, strict=True)
    ]
    tokenizer = llava.inputs.tokenizer
    want = 0.0
    for item, answer in zip(items, answers, strict=True):
        tokens = tokenizer(f" {answer}", add_special_tokens=False).input_ids
        inputs = llava.prepare(text=[item["text"]], images=[item["images"]])
        logs = torch.log_softmax(llava.run(inputs).output.logits[0], -1)
        want += sum(float(logs[-1 - len(tokens) + i, t]) for i, t in enumerate(tokens)) / 3
    model = mm.HookedModel(llava.wrapped, inputs=replace(llava.inputs, padding_side=side))
    score = mm_sae.answer_likelihood(tokenizer, answers)
    site = "language.blocks.0.hook_resid_post"
    found = mm_sae.evaluate(
        model, perfect(site, 128), items, tokens="all", score=score, batch_size=3
    ).recovered
    assert found is not None
    assert found.plain == pytest.approx(want, rel=1e-3)


@torch.no_grad()
def test_scores_of_a_loop_are_those_of_each_step() -> None:
    case = CASES["stable_diffusion"]()
    lens = mm.wrap(case.model)
    site = "denoiser.blocks.1.hook_resid_post"
    inputs = {"num_inference_steps": 3, "output_type": "pt"}
    run = lens.run(inputs | {"prompt": ["a cat"], "seed": [0]}, read=[mm.Read(site, rows="cond")])
    sae = sae_at(site, run[site].shape[-1])
    report = mm_sae.evaluate(lens, sae, ["a cat"], inputs=inputs, steps=[0, 2])
    assert sorted(report.by_step) == [0, 2]
    for step, scores in report.by_step.items():
        x = run[site][step, 0]
        left = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
        assert scores.n_rows == len(x)
        assert scores.explained == pytest.approx(1 - float(left), rel=1e-3)


# ---- steering ------------------------------------------------------------------------------------


def test_steering_a_vlm_changes_what_it_says_and_ablating_nothing_does_not(llava: Any) -> None:
    (picture,) = world.render_batch([world.by_hand("white", world.thing("circle", "red"))])
    inputs = {
        "text": ["<image>\nquestion: what colour is the circle? answer:"],
        "images": [[Image.fromarray(picture)]],
    }
    site = "language.blocks.1.hook_resid_post"
    sae = perfect(site, 128)
    tokenizer = llava.inputs.tokenizer
    red, blue = (tokenizer(f" {c}", add_special_tokens=False).input_ids[-1] for c in ("red", "blue"))
    head = llava.wrapped.get_output_embeddings().weight
    towards = head[blue] - head[red]
    with torch.no_grad():  # One latent more or less: along what tells blue from red.
        sae.W_dec[0] = towards / towards.norm()
    plain = llava.run(inputs).output.logits[0, -1]
    assert int(plain.argmax()) == red
    moved = llava.run(inputs, edit=mm_sae.steer(llava, sae, 0, "add", 60.0)).output.logits[0, -1]
    assert moved[blue] - moved[red] > plain[blue] - plain[red] + 1
    steered = mm_sae.steer(llava, sae, 0, "add", 60.0)
    written = llava.generate(**inputs, max_new_tokens=2, edit=steered).output
    assert not torch.equal(written, llava.generate(**inputs, max_new_tokens=2))


def test_steering_a_sampling_loop_moves_the_asked_steps_and_rows_only() -> None:
    case = CASES["stable_diffusion"]()
    lens = mm.wrap(case.model)
    site = "denoiser.blocks.1.hook_resid_post"
    inputs = case.inputs | {"num_inference_steps": 3}
    plain = lens.run(inputs, read=[site])[site]
    sae = sae_at(site, plain.shape[-1])
    edit = mm_sae.steer(lens, sae, 5, "clamp", 4.0, steps=[1], rows="cond")
    run = lens.run(inputs, read=[site], edit=edit)
    rows = run.rows["denoiser"]
    assert run.receipts[0].fired == 1
    assert torch.equal(run[site][0], plain[0])
    assert torch.equal(run[site][1][rows["uncond"]], plain[1][rows["uncond"]])
    acts = sae.encode(plain[1][rows["cond"]])[..., 5:6]
    want = plain[1][rows["cond"]] + (4.0 - acts) * sae.W_dec[5]
    torch.testing.assert_close(run[site][1][rows["cond"]], want, rtol=0, atol=1e-5)
    assert not torch.equal(run[site][2], plain[2])
