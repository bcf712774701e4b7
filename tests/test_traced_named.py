"""A TracedModel made of a name, as nnsight's users make theirs: weights on demand, and what comes with it."""

# ruff: noqa: SIM117  A traced block is one statement, and its `with` stands alone.
from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import beartype  # noqa: F401  Before nnsight, whose `.save` on every object it cannot be imported after.
import nnsight
import pytest
import tiny
import torch
from test_traced import both
from zoo_inputs import INPUTS

import mm_adapters as mm
from mm_adapters import zoo
from mm_adapters.checkpoints.fill_weights import load_weights_into
from mm_adapters.checkpoints.origin import CheckpointRef
from mm_adapters.traced import TracedModel

SITES = {
    "tiny-clip": "vision.blocks.1.attn.hook_pattern",
    "tiny-llava": "language.blocks.1.attn.hook_z",
    "tiny-sd": "denoiser.blocks.0.cross_attn.hook_q",
}


@pytest.mark.parametrize("name", list(SITES))
def test_weights_are_read_when_the_model_first_runs_and_then_equal_those_of_load(name: str) -> None:
    lazy = TracedModel(name)
    assert not lazy.dispatched
    assert {p.device.type for p in lazy._module.parameters()} == {"meta"}
    with lazy.edit() as (_, edited):
        edited.site(SITES[name])[:] = 0
    site = mm.load(name, engine="nnsight").run(INPUTS[name], read=[SITES[name]])[SITES[name]]
    assert torch.equal(lazy.run(INPUTS[name], read=[SITES[name]])[SITES[name]], site)
    assert lazy.dispatched
    assert edited.dispatched  # It has the same modules.
    zeroed = edited.run(INPUTS[name], read=[SITES[name]])[SITES[name]]
    assert not (zeroed[0] if name == "tiny-sd" else zeroed).any()  # A block edits the first step.
    at_once = TracedModel(name, dispatch=True, dtype="bfloat16")
    assert at_once.dispatched
    assert at_once.dtype == torch.bfloat16


def test_tied_weights_stay_tied_and_what_is_no_parameter_is_read_too() -> None:
    built = tiny.CASES["llava"]()
    built.model.lm_head.weight = built.model.model.language_model.embed_tokens.weight
    with torch.device("meta"):
        empty = type(built.model)(built.model.config)
    empty.lm_head.weight = empty.model.language_model.embed_tokens.weight
    built.model.generation_config.max_new_tokens = 7
    load_weights_into(empty, built.model)
    assert empty.lm_head.weight is empty.model.language_model.embed_tokens.weight
    assert not any(x.is_meta for x in (*empty.parameters(), *empty.buffers()))
    assert empty.generation_config.max_new_tokens == 7
    assert not empty.training
    with torch.no_grad():
        assert torch.equal(empty(**built.inputs).logits, built.model(**built.inputs).logits)


def test_a_model_that_is_here_takes_no_options_of_a_name() -> None:
    with pytest.raises(mm.InputError, match=r"device_map: of use with a name only.*device=, dtype="):
        TracedModel(tiny.CASES["clip"]().model, revision="main", device_map="auto")
    built = tiny.CASES["clip"]().model
    with pytest.raises(mm.InputError, match="device_map: of use with a name only"):
        TracedModel(built, inputs=mm.HookedModel(built)._inputs, device_map="auto")
    with pytest.raises(mm.CheckpointError, match="tiny-clop"):
        TracedModel("tiny-clop")


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map_of_one_device_is_that_device(device_map: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    model = TracedModel("tiny-clip", device_map=device_map, dispatch=True)
    want = mm.load("tiny-clip", device="cpu").wrapped.state_dict()
    for name, p in model._module.state_dict().items():
        assert p.device.type == "cpu"
        assert torch.equal(p, want[name])


@torch.no_grad()
def test_weights_go_in_by_their_names_and_a_copy_has_its_own() -> None:
    model = mm.wrap(tiny.CASES["clip"]().model, engine="nnsight")
    inputs = tiny.CASES["clip"]().inputs
    right = model.run(inputs).output.logits_per_image
    twin = copy.deepcopy(model)
    weights = model.state_dict()
    twin.load_state_dict(weights)
    assert torch.equal(twin.run(inputs).output.logits_per_image, right)
    twin.load_state_dict({name: torch.zeros_like(value) for name, value in weights.items()})
    assert not twin.run(inputs).output.logits_per_image.equal(right)
    assert sum(float(p.abs().sum()) for p in twin.parameters()) == 0
    assert torch.equal(model.run(inputs).output.logits_per_image, right)
    with pytest.raises(RuntimeError, match="Missing key"):
        twin.load_state_dict({"nothing": torch.zeros(1)})


TEXTS = ["a red circle", "a blue square on a white background"]


@torch.no_grad()
@pytest.mark.parametrize("given", ["texts", "invokes", "lists"])
def test_rows_of_a_decoder_are_padded_so_that_the_last_is_each_rows_own(given: str) -> None:
    model = TracedModel("tiny-llava", dispatch=True)
    ids = [model.tokenizer(text).input_ids for text in TEXTS]
    alone = []
    for row in ids:
        with model.trace(row):
            alone.append(model.output.logits[0, -1].save())
    if given == "invokes":
        with model.trace() as tracer:
            with tracer.invoke(TEXTS[0]):
                first = model.output.logits[:, -1].save()
            with tracer.invoke(ids[1]):
                second = model.output.logits[:, -1].save()
        last = torch.cat([first, second])
    else:
        with model.trace(TEXTS if given == "texts" else ids):
            last = model.output.logits[:, -1].save()
    assert len(ids[0]) != len(ids[1])
    torch.testing.assert_close(last, torch.stack(alone), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_token_ids_are_a_list_a_row_or_a_tensor() -> None:
    model = TracedModel("tiny-llava", dispatch=True)
    ids = model.tokenizer(TEXTS[0]).input_ids
    want = model.wrapped(input_ids=torch.tensor([ids])).logits
    for form in (ids, [ids], torch.tensor(ids), torch.tensor([ids])):
        with model.trace(form):
            logits = model.output.logits.save()
        assert torch.equal(logits, want)
        with model.trace(input_ids=form):
            logits = model.output.logits.save()
        assert torch.equal(logits, want)


def test_what_a_name_is_told_holds_before_its_weights_are_read() -> None:
    model = TracedModel("tiny-clip", dtype=torch.float16)
    assert {p.dtype for p in model._module.parameters() if p.is_floating_point()} == {torch.float16}
    assert TracedModel("tiny-clip", torch_dtype="auto").dtype == torch.float32


def test_a_module_that_is_here_takes_what_prepares_its_inputs() -> None:
    loaded = mm.load("tiny-llava")
    model = TracedModel(loaded.wrapped, processor=loaded.preparer.processor)
    with torch.no_grad(), model.trace(TEXTS[0]):
        logits = model.output.logits.save()
    assert torch.equal(logits, loaded(text=TEXTS[0]).logits)


def test_what_nnsights_users_look_for_is_there() -> None:
    clip, llava, sd = (mm.load(name, engine="nnsight") for name in INPUTS)
    assert clip.task == "zero-shot-image-classification"
    assert llava.task == "image-text-to-text"
    assert llava.tokenizer is llava.processor.tokenizer
    assert llava.image_processor is llava.processor.image_processor
    assert sd.pipeline is sd.wrapped
    assert sd.task is None
    vit = TracedModel(tiny.CASES["vit_classifier"]().model)
    assert vit.processor is vit.tokenizer is vit.image_processor is None
    with pytest.raises(mm.InputError, match="What is a ViTForImageClassification to do"):
        vit.pipe("a.png")


def test_renamed_modules_and_the_sites_in_them() -> None:
    model = TracedModel(tiny.CASES["clip"]().model, rename={"vision_model": "eye"})
    inputs = tiny.CASES["clip"]().inputs
    with torch.no_grad(), model.trace(**inputs):
        site = model.site("vision.blocks.1.hook_resid_post").save()
        native = model.eye.encoder.layers[2].output.save()
    run = model.run(inputs, read=["vision.blocks.1.hook_resid_post", "vision.blocks.2.hook_resid_post"])
    assert torch.equal(site, run["vision.blocks.1.hook_resid_post"])
    assert torch.equal(native, run["vision.blocks.2.hook_resid_post"])
    copied = copy.deepcopy(model)
    with torch.no_grad(), copied.trace(**inputs):
        again = copied.eye.encoder.layers[2].output.save()
    assert torch.equal(again, native)


# -- what a call may be given --------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava() -> Any:
    return mm.load("tiny-llava", engine="nnsight")


def test_messages_a_dictionary_and_an_encoding_are_what_text_and_images_are(llava: Any) -> None:
    (question,), (picture,) = INPUTS["tiny-llava"]["text"], INPUTS["tiny-llava"]["images"]
    chat = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}
    ]
    prompt = llava.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    expected = llava.run({"text": prompt, "images": [picture]}).output.logits
    encoding = llava.prepare(text=prompt, images=[picture])
    plain = [{"role": "user", "content": "is there a circle?"}]
    for call in ((chat,), ([chat],), ({"text": prompt, "images": [picture]},), (encoding,)):
        with torch.no_grad(), llava.trace(*call):
            logits = llava.output.logits.save()
        assert torch.equal(logits, expected), call
    with torch.no_grad(), llava.trace(plain):
        logits = llava.output.logits.save()
    text = llava.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "is there a circle?"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert torch.equal(logits, llava.run({"text": text}).output.logits)
    with pytest.raises(mm.InputError, match="Give the picture or its path"):
        with llava.trace([{"role": "user", "content": [{"type": "image", "url": "x"}]}]):
            llava.output.save()
    with pytest.raises(mm.InputError, match="no chat template"):
        with mm.load("tiny-clip", engine="nnsight").trace(chat):
            llava.output.save()


def test_several_raw_invokes_of_a_vlm_see_what_each_alone_sees(llava: Any) -> None:
    pictures = list(zoo.sample_images().values())[:2]
    rows = [
        {"text": "what colour is the circle?", "images": [pictures[0]]},
        {"text": "how many circles are there in this picture?", "images": [pictures[1]]},
        {"text": "is there a circle?"},
    ]
    sites = ["projector.hook_out", "language.blocks.1.hook_resid_post"]
    with torch.no_grad(), llava.trace() as tracer:
        values = nnsight.save([])
        with tracer.invoke(**rows[0]):
            values.append([llava.site(sites[0]), llava.site(sites[1])])
        with tracer.invoke(rows[1]["text"], images=rows[1]["images"]):
            values.append([llava.site(sites[0]), llava.site(sites[1])])
        with tracer.invoke(rows[2]["text"]):
            values.append([llava.site(sites[1])])
    for row, seen_values in zip(rows, values, strict=True):
        used = sites if "images" in row else sites[1:]
        alone = llava.run(row, read=used)
        for site, value in zip(used, seen_values, strict=True):
            assert len(value) == 1
            n = alone[site].shape[1]
            padded = value[:, -n:] if llava.tokenizer.padding_side == "left" else value[:, :n]
            torch.testing.assert_close(padded, alone[site], rtol=1e-4, atol=1e-4)


def test_what_is_given_twice_is_an_error(llava: Any) -> None:
    with pytest.raises(mm.InputError, match="both positionally and as `text=`"):
        with llava.trace("a", text="b"):
            llava.output.save()
    with pytest.raises(mm.InputError, match="images was given twice"):
        with llava.trace({"images": []}, images=[]):
            llava.output.save()


def test_pictures_by_position() -> None:
    clip = mm.load("tiny-clip", engine="nnsight")
    images = [Path(p) for p in INPUTS["tiny-clip"]["images"]]
    with torch.no_grad(), clip.trace(images):
        z = clip.site("vision.blocks.1.attn.hook_z").save()
    site = "vision.blocks.1.attn.hook_z"
    assert torch.equal(z, clip.run({"images": images}, read=[site])[site])


def test_each_steps_tokens_pass_the_generator(llava: Any) -> None:
    call = INPUTS["tiny-llava"] | {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    plain = llava.wrapped.generate(
        **llava.prepare(**INPUTS["tiny-llava"]), max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    with llava.generate(**call) as tracer:
        steps = nnsight.save([])
        for _ in tracer.iter[:]:
            steps.append(llava.generator.streamer.output)
        ids = nnsight.save(tracer.result)
    assert torch.equal(ids, plain)
    assert torch.equal(steps[0], plain[:, :-3])
    assert torch.equal(torch.cat(steps[1:]), plain[0, -3:-1])
    assert mm.load("tiny-clip", engine="nnsight").generator is None


def test_pipe_is_transformers_whole_pipeline_with_the_block_in_it(llava: Any) -> None:
    from transformers import pipeline

    (picture,) = INPUTS["tiny-llava"]["images"]
    call = {
        "text": "<image>question: what colour is it? answer:",
        "images": str(picture),
        "max_new_tokens": 3,
    }
    theirs: Any = pipeline("image-text-to-text", model=llava.wrapped, processor=llava.processor)
    expected = theirs(**call)
    with llava.pipe(**call) as tracer:
        output = nnsight.save(tracer.result)
    assert output == expected == llava.pipe(**call)
    with llava.pipe(**call) as tracer:
        llava.site("projector.hook_out")[:] = 0
        blind = nnsight.save(tracer.result)
    assert blind != expected
    with llava.pipe(**call, remote="local") as tracer:
        travelled = nnsight.save(tracer.result)
    assert travelled == expected
    with pytest.raises(ValueError, match="goes remote as a block"):
        llava.pipe(**call, remote="local")


def test_a_pipe_without_a_processor_takes_the_parts_that_there_are() -> None:
    from transformers import pipeline

    (picture,) = INPUTS["tiny-llava"]["images"]
    clip = mm.load("tiny-clip")
    assert clip.inputs is not None
    parts = {"tokenizer": clip.inputs.tokenizer, "image_processor": clip.inputs.image_processor}
    theirs: Any = pipeline("zero-shot-image-classification", model=clip.wrapped, **parts)
    call = {"candidate_labels": ["a red circle", "a blue square", "a star"]}
    traced = TracedModel(clip.wrapped, inputs=replace(clip.inputs, processor=None))
    assert traced.processor is None
    assert traced.pipe(str(picture), **call) == theirs(str(picture), **call)


# -- pipelines -----------------------------------------------------------------------------------


def test_another_pipeline_of_the_same_weights_by_its_name_or_class() -> None:
    from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline

    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    call = {
        "prompt": "a red circle",
        "image": picture,
        "strength": 0.5,
        "num_inference_steps": 4,
        "seed": 0,
        "output_type": "pt",
    }
    hooked = mm.load("tiny-sd", automodel=StableDiffusionImg2ImgPipeline)
    assert type(hooked.wrapped) is StableDiffusionImg2ImgPipeline
    expected = hooked.run(call, read=["denoiser.hook_out"])["denoiser.hook_out"]
    assert len(expected) == 2  # Half of the steps.
    lazy = TracedModel("tiny-sd", automodel=AutoPipelineForImage2Image)
    assert type(lazy.pipeline).__name__ == "StableDiffusionPipeline"
    assert torch.equal(lazy.run(call, read=["denoiser.hook_out"])["denoiser.hook_out"], expected)
    assert type(lazy.pipeline) is StableDiffusionImg2ImgPipeline
    assert lazy.origin == CheckpointRef("tiny-sd", {"automodel": "AutoPipelineForImage2Image"})
    both_of_them = torch.cat([picture, picture])
    with torch.no_grad(), lazy.trace(image=both_of_them, strength=0.5, num_inference_steps=4) as tracer:
        with tracer.invoke("a red circle"):
            one = lazy.unet.output[0].save()
        with tracer.invoke("a blue square"):
            lazy.unet.output[0][:] = 0
    assert one.shape[0] == 2
    with pytest.raises(mm.InputError, match="NoSuchPipeline"):
        TracedModel("tiny-sd", automodel="NoSuchPipeline")


@pytest.mark.parametrize(
    "name", ["stable_diffusion", "stable_diffusion_xl", "dit", "sana", "deepfloyd_if", "kandinsky"]
)
def test_a_whole_pipeline_is_scanned(name: str) -> None:
    built, _, traced = both(name)
    scheduler = built.model.scheduler
    loop = f"{traced.sitemap.model_record.loop}."
    sites = [
        s for s in traced.sitemap.sites if s.startswith(loop) and s.endswith(("hook_pattern", "hook_out"))
    ]
    sites = sites[:: max(1, len(sites) // 4)]
    shapes = {}
    for site in sites:
        with traced.scan(**built.inputs):
            value = traced.site(site)
            assert isinstance(value, torch._subclasses.FakeTensor)
            shapes[site] = nnsight.save(tuple(value.shape))
    assert built.model.scheduler is scheduler
    run = traced.run(built.inputs, read=sites)
    assert shapes == {s: tuple(run[s].shape[1:]) for s in sites}


def test_every_step_of_a_scan_has_a_shape_and_no_weights_are_read() -> None:
    model = TracedModel("tiny-sd")
    site = "denoiser.blocks.0.cross_attn.hook_pattern"
    with model.scan("a red circle", num_inference_steps=3) as tracer:
        shapes = nnsight.save([])
        for _ in tracer.iter[:]:
            shapes.append(tuple(model.site(site).shape))
    assert not model.dispatched
    real = model.run({"prompt": "a red circle", "num_inference_steps": 3}, read=[site])[site]
    assert shapes == [tuple(real.shape[1:])] * 3


def test_a_scan_that_needs_a_value_says_so() -> None:
    _, _, traced = both("stable_diffusion_3")
    with pytest.raises(NotImplementedError, match="its code branches on a value"):
        with (
            pytest.warns(UserWarning, match="text_encoder reads 16 of its 18 tokens"),
            traced.scan(prompt=["a prompt that is cut"], height=8, width=8, max_sequence_length=20),
        ):
            traced.output.save()
    with pytest.raises(ValueError, match="runs here"):
        traced.scan(prompt="a", remote=True)


# -- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(INPUTS))
def test_layouts_are_those_of_the_hooked_model_with_and_without_weights(name: str) -> None:
    raw = {k: v for k, v in INPUTS[name].items() if k in ("text", "images")} or {"text": ["a red circle"]}
    expected = mm.load(name).layout(**raw)
    assert expected
    for model in (mm.load(name, engine="nnsight"), mm.load(name, engine="nnsight", device="meta")):
        assert model.layout(**raw) == expected
