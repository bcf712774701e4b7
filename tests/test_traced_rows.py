"""Several invokes in one run see their own rows; loops over steps lose nothing."""

# ruff: noqa: PT012, SIM117  A traced block is one statement, and its `with` stands alone.
from __future__ import annotations

from functools import cache
from typing import Any

import beartype  # noqa: F401  Before nnsight, whose `.save` on every object it cannot be imported after.
import nnsight
import pytest
import tiny
import torch
from nnsight.intervention.interleaver import OutOfOrderError

import mm_adapters as mm
from mm_adapters.inputs.prepare import Inputs
from mm_adapters.nnsight_engine.batcher import RowBatcher
from mm_adapters.nnsight_engine.invokes import combine, combine_prompts
from mm_adapters.nnsight_engine.text_rows import Padding
from mm_adapters.traced import TracedModel


@cache
def model(name: str) -> tuple[tiny.Case, TracedModel]:
    built = tiny.CASES[name]()
    return built, TracedModel(built.model)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def ids(*rows: list[int]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    padded = [row + [59] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


Z_VISION, Z_TEXT = "vision.blocks.1.attn.hook_z", "text.blocks.1.attn.hook_z"
PATTERN = "vision.blocks.2.attn.hook_pattern"


# -- contrastive: images and texts are two axes --------------------------------------------------


def test_ragged_invokes_of_images_and_texts_see_their_own_rows() -> None:
    _, traced = model("clip")
    pixels = tiny.pixels(5)
    texts = [ids([58, 3, 4, 59]), ids([58, 5, 59], [58, 6, 7, 8, 59], [58, 9, 10, 59])]
    with torch.no_grad(), traced.trace() as tracer:
        with tracer.invoke(pixel_values=pixels[:3], **texts[0]):
            z0 = traced.site(Z_VISION).save()
            t0 = traced.site(Z_TEXT).save()
            o0 = traced.output.save()
        with tracer.invoke(pixel_values=pixels[3:], **texts[1]):
            z1 = traced.site(Z_VISION).save()
            native = traced.text_model.encoder.layers[1].output.save()
            o1 = nnsight.save(tracer.result)
    for i, (pixel, z, o) in enumerate(((pixels[:3], z0, o0), (pixels[3:], z1, o1))):
        alone = traced.run(
            {"pixel_values": pixel, **texts[i]}, read=[Z_VISION, Z_TEXT, "text.blocks.1.hook_resid_post"]
        )
        close(z, alone[Z_VISION])
        for key in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
            close(o[key], alone.output[key])
        if i == 0:
            close(t0[:, :4], alone[Z_TEXT])
        else:
            close(native, alone["text.blocks.1.hook_resid_post"])


def test_an_edit_of_one_invoke_leaves_the_others_alone() -> None:
    built, traced = model("clip")
    inputs = built.inputs
    rows = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(2)]
    plain = [traced.run(r).output.image_embeds for r in rows]
    edited = traced.run(rows[1], edit=[mm.Edit(PATTERN, lambda x: x * 0)]).output.image_embeds
    for written in (True, False):
        with torch.no_grad(), traced.trace() as tracer:
            with tracer.invoke(**rows[0]):
                first = traced.output.image_embeds.save()
            with tracer.invoke(**rows[1]):
                if written:
                    traced.site(PATTERN)[:] = 0
                else:
                    traced.site(PATTERN, torch.zeros(1, 4, 5, 5))
                second = traced.output.image_embeds.save()
            with tracer.invoke():
                everything = traced.site("vision.blocks.2.hook_resid_post").save()
        close(first, plain[0])
        close(second, edited)
        assert (second - plain[1]).abs().max() > 1e-3
        assert everything.shape[0] == 2


def test_images_alone_and_texts_alone_share_a_run() -> None:
    built, traced = model("clip")
    pixels, text = built.inputs["pixel_values"], ids([58, 3, 4, 59])
    with torch.no_grad(), traced.trace(pixel_values=pixels) as tracer:
        z = traced.site(Z_VISION).save()
        image = nnsight.save(tracer.result)
    close(image.pooler_output, built.model.get_image_features(pixel_values=pixels).pooler_output)
    with torch.no_grad(), traced.trace(**text) as tracer:
        words = nnsight.save(tracer.result)
    close(words.pooler_output, built.model.get_text_features(**text).pooler_output)
    with torch.no_grad(), traced.trace() as tracer:
        with tracer.invoke(pixel_values=pixels):
            z_both = traced.site(Z_VISION).save()
            none = traced.text_model.encoder.layers[0].output.save()
        with tracer.invoke(**text):
            t_both = traced.site(Z_TEXT).save()
    close(z_both, z)
    assert t_both.shape[0] == 1
    assert none.shape[0] == 0
    with pytest.raises(mm.InputError, match="gave no images"):
        with torch.no_grad(), traced.trace() as tracer:
            with tracer.invoke(pixel_values=pixels):
                z = traced.site(Z_VISION).save()
            with tracer.invoke(**text):
                z = traced.site(Z_VISION).save()


def test_images_alone_share_a_run_with_texts_of_several_lengths() -> None:
    _, traced = model("clip")
    pixels = tiny.pixels(3)
    texts = [ids([58, 3, 4, 7, 59]), ids([58, 5, 59])]
    with torch.no_grad(), traced.trace() as tracer:
        with tracer.invoke(pixel_values=pixels[:2]):
            first = traced.site(Z_VISION).save()
        with tracer.invoke(**texts[0]):
            long = traced.site(Z_TEXT).save()
        with tracer.invoke(pixel_values=pixels[2:]):
            last = traced.site(Z_VISION).save()
        with tracer.invoke(**texts[1]):
            short = traced.site(Z_TEXT).save()
    close(first, traced.run({"pixel_values": pixels[:2]}, read=[Z_VISION])[Z_VISION])
    close(last, traced.run({"pixel_values": pixels[2:]}, read=[Z_VISION])[Z_VISION])
    close(long, traced.run(texts[0], read=[Z_TEXT])[Z_TEXT])
    close(short[:, :3], traced.run(texts[1], read=[Z_TEXT])[Z_TEXT])


@pytest.mark.parametrize("left", [True, False])
def test_invokes_are_joined_row_after_row_and_padded(left: bool) -> None:
    pixels = tiny.pixels(2)
    one = {"input_ids": torch.tensor([[1, 5, 6]]), "mm_token_type_ids": torch.tensor([[0, 1, 1]])}
    two = {
        "input_ids": torch.tensor([[1, 7], [1, 8]]),
        "attention_mask": torch.tensor([[0, 1], [1, 1]]),
        "mm_token_type_ids": torch.tensor([[0, 1], [0, 0]]),
    }
    found = combine([one, {"pixel_values": pixels}, two | {"use_cache": False}], Padding(9, left))
    rows = {
        "input_ids": ([1, 7], [1, 8]),
        "attention_mask": ([0, 1], [1, 1]),
        "mm_token_type_ids": ([0, 1], [0, 0]),
    }
    first = {"input_ids": [1, 5, 6], "attention_mask": [1, 1, 1], "mm_token_type_ids": [0, 1, 1]}
    for key, own in rows.items():
        pad = 9 if key == "input_ids" else 0
        want = [first[key], *([pad, *row] if left else [*row, pad] for row in own)]
        assert found[key].tolist() == want
    assert torch.equal(found["pixel_values"], pixels)
    assert found["use_cache"] is False
    assert found.keys() == {*rows, "pixel_values", "use_cache"}


def test_prompts_are_joined_and_what_a_call_takes_once_stays_one() -> None:
    sigmas = torch.tensor([1.0, 0.5])
    one = {"prompt": "a cat", "seed": 3, "sigmas": sigmas, "prompt_embeds": torch.zeros(1, 4)}
    two = {
        "prompt": ["a dog", "a bird"],
        "seed": [4, 5],
        "sigmas": sigmas.clone(),
        "prompt_embeds": torch.ones(2, 4),
    }
    found = combine_prompts([one | {"negative_prompt": "ugly"}, two])
    assert found["prompt"] == ["a cat", "a dog", "a bird"]
    assert found["negative_prompt"] == ["ugly", "", ""]
    assert found["seed"] == [3, 4, 5]
    assert torch.equal(found["sigmas"], sigmas)
    assert found["prompt_embeds"].tolist() == [[0.0] * 4, [1.0] * 4, [1.0] * 4]
    with pytest.raises(mm.InputError, match="sigmas is"):
        combine_prompts([one, two | {"sigmas": sigmas / 2}])
    with pytest.raises(mm.InputError, match="takes 2 seeds"):
        combine_prompts([one, two | {"seed": 4}])
    for left_out in ("prompt", "seed"):
        with pytest.raises(mm.InputError, match=f"give (a )?{left_out} and some do not"):
            combine_prompts([one, {k: v for k, v in two.items() if k != left_out}])


def test_a_bare_towers_rows_are_those_of_its_own_argument() -> None:
    _, traced = model("clip_text")
    tokens = torch.tensor([[58, 3, 59], [58, 4, 59]])
    for arguments in (
        {"position_ids": torch.arange(3)[None], "input_ids": tokens},
        {"input_ids": tokens, "position_ids": torch.arange(3)[None]},
    ):
        assert traced.rows.count(arguments, {}) == {"rows": 2}
    assert traced.rows.count({}, {}) == {"rows": 0}
    assert traced.rows.count({"inputs_embeds": torch.zeros(3, 2, 24)}, {}) == {"rows": 3}


def test_raw_texts_and_images_are_prepared_for_each_invoke() -> None:
    from PIL import Image
    from transformers import CLIPImageProcessor

    built = tiny.CASES["clip"]()
    side = {"height": 28, "width": 28}
    inputs = Inputs(
        "contrastive",
        tokenizer=tiny.letter_tokenizer(16),
        image_processor=CLIPImageProcessor(size=side, crop_size=side),
    )
    traced = TracedModel(built.model, inputs=inputs)
    images = [Image.new("RGB", (28, 28), c) for c in ("red", "lime", "blue")]
    with torch.no_grad(), traced.trace() as tracer:
        with tracer.invoke(text="a cat", images=images[:1]):
            a = traced.output.logits_per_image.save()
        with tracer.invoke(["dogs", "a longer text"], images=images[1:]):
            z = traced.site(Z_TEXT).save()
            b = traced.output.logits_per_image.save()
    close(a, traced.run({"text": "a cat", "images": images[:1]}).output.logits_per_image)
    alone = traced.run({"text": ["dogs", "a longer text"], "images": images[1:]}, read=[Z_TEXT])
    close(b, alone.output.logits_per_image)
    assert z.shape[0] == 2
    with torch.no_grad(), traced.trace(images=images) as tracer:
        vision = traced.site(Z_VISION).save()
    assert vision.shape[0] == 3
    with pytest.raises(mm.InputError, match="came without a processor"):
        model("clip")[1].run({"text": ["a cat"]})


def test_rows_that_cannot_be_told_apart_are_an_error() -> None:
    built, traced = model("open_clip")
    image, text = tiny.pixels(3), torch.cat([built.inputs["text"], built.inputs["text"][:1]])
    output_dict, built.model.output_dict = built.model.output_dict, False
    try:
        with pytest.raises(mm.InputError, match="divided otherwise"):
            with torch.no_grad(), traced.trace() as tracer:
                with tracer.invoke(image=image[:2], text=text[:1]):
                    first = nnsight.save(tracer.result)
                with tracer.invoke(image=image[2:], text=text[1:]):
                    second = nnsight.save(tracer.result)
        with torch.no_grad(), traced.trace() as tracer:
            with tracer.invoke(image=image[:2], text=text[:2]):
                first = nnsight.save(tracer.result)
            with tracer.invoke(image=image[2:], text=text[2:]):
                second = nnsight.save(tracer.result)
        assert [len(x) for x in (*first[:2], *second[:2])] == [2, 2, 1, 1]
    finally:
        built.model.output_dict = output_dict
    z = "vision.blocks.0.attn.hook_z"
    with torch.no_grad(), traced.trace() as tracer:
        with tracer.invoke(image=image[:2], text=text[:1]):
            first = traced.site(z).save()
        with tracer.invoke(image=image[2:], text=text[1:]):
            second = traced.site(z).save()
            third = traced.site("text.blocks.0.attn.hook_z").save()
    assert [len(x) for x in (first, second, third)] == [2, 1, 2]


def test_options_that_differ_between_invokes_are_an_error() -> None:
    built, traced = model("clip")
    with pytest.raises(mm.InputError, match="output_hidden_states"):
        with traced.trace() as tracer:
            with tracer.invoke(**built.inputs, output_hidden_states=True):
                traced.output.save()
            with tracer.invoke(**built.inputs, output_hidden_states=False):
                traced.output.save()


@pytest.mark.parametrize("name", ["siglip", "open_clip_custom_text", "clip_vision", "unet"])
def test_two_invokes_equal_two_runs(name: str) -> None:
    built, traced = model(name)
    batched = {k: v for k, v in built.inputs.items() if v.ndim and v.shape[0] == 2}
    rows = [built.inputs | {k: v[i : i + 1] for k, v in batched.items()} for i in range(2)]
    site = next(s for s in reversed(traced.sitemap.sites) if s.endswith("hook_pattern"))
    with torch.no_grad(), traced.trace() as tracer:
        with tracer.invoke(**rows[0]):
            a = traced.site(site).save()
        with tracer.invoke(**rows[1]):
            b = traced.site(site).save()
    for value, row in zip((a, b), rows, strict=True):
        close(value, traced.run(row, read=[site])[site])


# -- images and text in one sequence -------------------------------------------------------------


def test_ragged_invokes_of_a_vlm_see_their_own_rows() -> None:
    built, traced = model("llava")
    ids_, pixels = built.inputs["input_ids"], tiny.pixels(3)
    short, long = ids_[:1, :8], ids_[1:]
    two = torch.cat([ids_[1:, :5], ids_[1:, 1:]], 1)  # Two images in one row.
    text_only = ids_[:1, 5:]
    with torch.no_grad(), traced.trace() as tracer:
        with tracer.invoke(input_ids=short, pixel_values=pixels[:1]):
            v0 = traced.site("vision.blocks.1.attn.hook_z").save()
            p0 = traced.site("projector.hook_out").save()
            l0 = traced.site("language.blocks.1.hook_resid_post").save()
        with tracer.invoke(input_ids=two, pixel_values=pixels[1:]):
            v1 = traced.site("vision.blocks.1.attn.hook_z").save()
            logits = traced.output.logits.save()
        with tracer.invoke(input_ids=text_only):
            l2 = traced.site("language.blocks.0.attn.hook_pattern").save()
    assert [len(x) for x in (v0, p0, l0, v1, logits, l2)] == [1, 1, 1, 2, 1, 1]
    alone = traced.run(
        {"input_ids": short, "pixel_values": pixels[:1]},
        read=["vision.blocks.1.attn.hook_z", "projector.hook_out", "language.blocks.1.hook_resid_post"],
    )
    close(v0, alone["vision.blocks.1.attn.hook_z"])
    close(p0, alone["projector.hook_out"])
    close(l0[:, : short.shape[1]], alone["language.blocks.1.hook_resid_post"])
    close(logits, traced.run({"input_ids": two, "pixel_values": pixels[1:]}).output.logits)
    n = text_only.shape[1]
    alone = traced.run({"input_ids": text_only}, read=["language.blocks.0.attn.hook_pattern"])
    close(l2[..., :n, :n], alone["language.blocks.0.attn.hook_pattern"])
    assert long.shape == (1, 10)


# -- steps ---------------------------------------------------------------------------------------


def generation(**more: Any) -> dict[str, Any]:
    built, _ = model("llava")
    return built.inputs | {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False} | more


def test_a_loop_over_all_steps_ends_and_what_follows_it_runs() -> None:
    _, traced = model("llava")
    with traced.generate(**generation()) as tracer:
        steps = nnsight.save([])
        projected = traced.site("projector.hook_out").save()
        for step in tracer.iter[:]:
            steps.append((step, traced.site("language.blocks.1.hook_resid_post").shape[1]))
        ids_ = nnsight.save(tracer.result)
        after = nnsight.save("ran")
    assert [s for s, _ in steps] == [0, 1, 2, 3]
    assert [n for _, n in steps] == [10, 1, 1, 1]
    assert torch.equal(ids_, traced.generate(**generation()))
    assert after == "ran"
    assert projected.shape[0] == 2


def test_a_slice_past_the_last_step_ends_with_it_and_an_index_there_is_an_error() -> None:
    _, traced = model("llava")
    with traced.generate(**generation()) as tracer:
        steps_made = nnsight.save([])
        for step in tracer.iter[1:9]:
            traced.site("language.hook_embed")
            steps_made.append(step)
        after = nnsight.save("ran")
    assert steps_made == [1, 2, 3]
    assert after == "ran"
    for steps in (7, [0, 2, 7]):
        with pytest.raises(IndexError, match="Step 7 was asked for"):
            with traced.generate(**generation()) as tracer:
                for _ in tracer.iter[steps]:
                    traced.site("language.hook_embed")


def test_a_module_that_runs_once_is_an_error_inside_the_loop() -> None:
    _, traced = model("llava")
    with pytest.raises(OutOfOrderError, match=r"projector.hook_out was asked for at step 1.*ran once"):
        with traced.generate(**generation()) as tracer:
            for _ in tracer.iter[:2]:
                traced.site("projector.hook_out").save()
    with pytest.raises(OutOfOrderError, match="had run already"):
        with traced.generate(**generation()) as tracer:
            for _ in tracer.iter[:]:
                traced.site("language.blocks.2.hook_resid_post").save()
                traced.site("language.blocks.0.hook_resid_post").save()


def prompts(*texts: str, **more: Any) -> dict[str, Any]:
    return {"prompt": list(texts), "num_inference_steps": 3, "output_type": "pt", **more}


Q, SCORES = "denoiser.blocks.0.attn.hook_q", "denoiser.blocks.1.cross_attn.hook_pattern"


def test_a_sampling_loop_is_read_and_edited_step_by_step() -> None:
    _, traced = model("stable_diffusion")
    inputs = prompts("a cat", seed=3)
    run = traced.run(inputs, read=[Q, SCORES], edit=[mm.Edit(SCORES, lambda x: x * 0, steps=[1])])
    with torch.no_grad(), traced.generate(**inputs) as tracer:
        q, patterns = nnsight.save([]), nnsight.save([])
        for step in tracer.iter[:]:
            q.append(traced.site(Q))
            if step == 1:
                traced.site(SCORES)[:] = 0
            patterns.append(traced.site(SCORES))
        images = nnsight.save(tracer.result)
    assert torch.equal(torch.stack(q), run[Q])
    assert torch.equal(torch.stack(patterns), run[SCORES])
    assert torch.equal(images.images, run.output.images)
    plain = traced.run(inputs, read=[Q])
    with traced.generate(**inputs) as tracer:
        picked = nnsight.save({s: traced.site(Q).clone() for s in tracer.iter[[0, 2]]})
    assert torch.equal(torch.stack(list(picked.values())), plain[Q][[0, 2]])


# -- the field notes' defects of diffusion models, D1 to D8 --------------------------------------


def test_d1_a_pipeline_and_its_parts_can_be_scanned() -> None:
    _, traced = model("stable_diffusion")
    with traced.scan("a cat"):
        shape = nnsight.save(tuple(traced.site(SCORES).shape))
    assert shape == (2, 4, 16, 16)
    text = torch.randn(2, 7, 24)
    with traced.unet.scan(torch.randn(2, 4, 8, 8), torch.tensor(1), encoder_hidden_states=text):
        shape = nnsight.save(tuple(traced.site(SCORES).shape))
    assert shape == (2, 4, 16, 7)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("per_prompt", [1, 2])
def test_d2_each_invoke_of_a_pipeline_sees_its_own_rows(guidance: float, per_prompt: int) -> None:
    _, traced = model("stable_diffusion")
    options = {
        "guidance_scale": guidance,
        "num_images_per_prompt": per_prompt,
        "num_inference_steps": 2,
        "output_type": "pt",
    }
    seeds = [[7, 8, 9, 10][: 2 * per_prompt], [20, 21][:per_prompt]]
    first = {"prompt": ["a cat", "a dog"], "seed": seeds[0]}
    second = {"prompt": ["a mouse"], "seed": seeds[1]}
    parts = 2 if guidance > 1 else 1
    with torch.no_grad(), traced.trace(**options) as tracer:
        with tracer.invoke(**first):
            a = traced.site(SCORES).save()
            ra = nnsight.save(tracer.result)
        with tracer.invoke(**second):
            t = traced.site("text.blocks.0.hook_resid_post").save()
            traced.site(SCORES)[:] = 0
            rb = nnsight.save(tracer.result)
    assert len(a) == 2 * per_prompt * parts
    assert len(t) == 1
    alone = traced.run(first | options, read=[SCORES])
    close(a, alone[SCORES][0])
    close(ra.images, alone.output.images)
    edited = traced.run(second | options, edit=[mm.Edit(SCORES, lambda x: x * 0, steps=[0])])
    close(rb.images, edited.output.images)


def test_d2_rows_with_folded_heads_are_narrowed() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    built = tiny.CASES["stable_diffusion"]()
    built.model.unet.set_attn_processor(AttnProcessor())
    traced = TracedModel(built.model)
    options = {"num_inference_steps": 1, "output_type": "pt"}
    attn = traced.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    with torch.no_grad(), traced.trace(**options) as tracer:
        with tracer.invoke("a cat", seed=1):
            a = attn.source.self_processor_0.source.attn_get_attention_scores_0.output.save()
        with tracer.invoke("a dog", seed=2):
            folded = attn.source.self_processor_0.source.attn_get_attention_scores_0.output.save()
            b = traced.site("denoiser.blocks.0.cross_attn.hook_z").save()
    heads = traced.sitemap["denoiser.blocks.0.cross_attn.hook_pattern"].axes[1]
    n = int(heads.partition("=")[2])
    assert a.shape[0] == folded.shape[0] == 2 * n
    assert b.shape[0] == 2
    site = "denoiser.blocks.0.cross_attn.hook_pattern"
    alone = traced.run({"prompt": "a dog", "seed": 2, **options}, read=[site])[site][0]
    close(folded.unflatten(0, (2, n)), alone)


def test_d3_prompts_and_seeds_are_joined_and_other_options_must_agree() -> None:
    _, traced = model("stable_diffusion")
    with pytest.raises(mm.InputError, match=r"guidance_scale is 2\.0 in one invoke and 7\.5 in another"):
        with traced.trace() as tracer:
            with tracer.invoke("a cat", guidance_scale=2.0):
                traced.site(Q).save()
            with tracer.invoke("a dog", guidance_scale=7.5):
                traced.site(Q).save()
    options = {"num_inference_steps": 2, "output_type": "pt"}
    with torch.no_grad(), traced.trace(**options) as tracer:
        with tracer.invoke("a cat", negative_prompt="ugly", seed=1):
            a = nnsight.save(tracer.result)
        with tracer.invoke("a dog", seed=2):
            b = nnsight.save(tracer.result)
    cat = {"prompt": "a cat", "negative_prompt": "ugly", "seed": 1, **options}
    close(a.images, traced.run(cat).output.images)
    close(b.images, traced.run({"prompt": "a dog", "seed": 2, **options}).output.images)


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_d4_the_result_inside_an_invoke_is_that_invokes(kind: str) -> None:
    _, traced = model("stable_diffusion")
    with torch.no_grad(), traced.trace(num_inference_steps=1, output_type=kind) as tracer:
        with tracer.invoke(["a cat", "a dog"]):
            two = nnsight.save(tracer.result)
        with tracer.invoke("a mouse"):
            one = nnsight.save(tracer.result)
    assert (len(two.images), len(one.images)) == (2, 1)


def test_d5_gradients_go_through_the_loop() -> None:
    _, traced = model("stable_diffusion")
    inputs = prompts("a cat", seed=3, output_type="latent") | {"num_inference_steps": 2}
    run = traced.run(inputs, read=[mm.Read(Q)], grad_of=lambda o: o.images.square().sum())
    with traced.generate(**inputs, differentiable=True) as tracer:
        q = traced.site(Q)
        loss = tracer.result.images.square().sum()
        with loss.backward():
            grad = q.grad.save()
    assert grad.abs().max() > 0
    torch.testing.assert_close(grad, run.grads[Q][0], rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


def test_d6_a_pipeline_object_is_accepted_and_shares_its_weights() -> None:
    built, traced = model("stable_diffusion")
    assert traced.unet._module is built.model.unet
    assert {id(p) for p in traced._module.parameters()} >= {id(p) for p in built.model.unet.parameters()}


def test_d7_dtype_and_device_are_the_pipelines() -> None:
    built = tiny.CASES["stable_diffusion"]()
    traced = TracedModel(built.model.to(torch.float64))
    assert traced.dtype == torch.float64
    run = traced.run(prompts("a cat"), read=[Q])
    assert run[Q].dtype == torch.float64


def test_d8_rows_of_a_guidance_we_do_not_know_are_an_error() -> None:
    _, traced = model("stable_diffusion")
    traced.run(prompts("a cat") | {"num_inference_steps": 1})  # Guidance in two parts.
    batcher = RowBatcher(traced)
    groups = [batcher.add("a cat"), batcher.add(["a dog", "a mouse"])]
    batcher.locate("model.unet.conv_in.output")
    assert [len(batcher.narrow(torch.zeros(6, 4, 8, 8), g)) for g in groups] == [2, 4]
    with pytest.raises(mm.InputError, match="has 9 rows; this run has 3 pictures in 2 parts"):
        batcher.narrow(torch.zeros(9, 4, 8, 8), groups[0])
