"""What a call does not take, or cannot mean, is an InputError before any module runs, in both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_diffusion as td
import torch
from PIL import Image
from torch import nn
from zoo_inputs import INPUTS

import mm_adapters as mm

NAN = float("nan")
ENGINES = ("hooked", "nnsight")


@cache
def zoo(name: str, engine: str) -> Any:
    model = mm.load(name, device="cpu", engine=engine)
    if name == "tiny-sd":
        model.wrapped.set_progress_bar_config(disable=True)
    return model


@cache
def family(name: str, engine: str) -> Any:
    return mm.wrap(tiny.CASES[name]().model, engine=engine)


@contextmanager
def nothing_runs(model: Any) -> Iterator[None]:
    """Fails if a module of the model runs inside."""

    def refuse(module: nn.Module, args: Any) -> None:
        raise AssertionError(f"{type(module).__name__} ran before the error.")

    wrapped = model.wrapped
    parts = [wrapped] if isinstance(wrapped, nn.Module) else wrapped.components.values()
    modules = [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]
    handles = [m.register_forward_pre_hook(refuse) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def refused(model: Any, call: Callable[[], Any], says: str) -> None:
    with nothing_runs(model), pytest.raises(mm.InputError, match=says) as caught:
        call()
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__


DRAW = {"prompt": "a red circle", "num_inference_steps": 1, "seed": 0, "output_type": "latent"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"guidence_scale": 2}, r"does not take guidence_scale=. Did you mean guidance_scale"),
        ({"pixel_values": 1}, "does not take pixel_values="),
        ({"num_inference_steps": 2.0}, "num_inference_steps=2.0: pass a whole number from 1 up"),
        ({"num_inference_steps": True}, "num_inference_steps=True"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"seed": "12"}, "seed='12': a seed is a whole number"),
        ({"seed": []}, "seed is empty"),
        ({"seed": 2**64}, "at most 64 bits"),
        ({"seed": [1, 2]}, "There are 2 in seed for 1 pictures"),
        ({"generator": torch.Generator()}, "seed= and generator= were both given"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf. Pass a finite number"),
        ({"guidance_scale": "7"}, "guidance_scale='7' is str. Pass a number"),
        ({"guidance_scale": [7.0]}, "is a list. Pass one number"),
        ({"eta": NAN}, "eta=nan"),
        ({"height": 62, "width": 62}, "height=62: .* draws multiples of 4 pixels .* Pass 60 or 64"),
        ({"width": 64.0}, "width=64.0: pass a whole number"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"output_type": "jpg"}, "output_type='jpg'; there is pil, np, pt, latent"),
        ({"images": [torch.zeros(3, 8, 8)]}, "makes pictures from text alone. Leave images out"),
        ({"text": "a blue square"}, "text= and prompt= were both given"),
        ({"prompt": None}, "cannot be called so: Provide either `prompt`"),
        ({"prompt": 3}, "prompt is int. Pass a string"),
        ({"prompt": ["a", 3]}, r"prompt\[1\] is int"),
        ({"negative_prompt": b"a"}, "negative_prompt is bytes"),
        ({"negative_prompt": ["a", "b"]}, "There are 2 texts in negative_prompt and 1 in prompt"),
        ({"latents": torch.full((1, 4, 16, 16), NAN)}, "latents has values that are NaN"),
        ({"latents": torch.zeros(1, 3, 16, 16)}, r"latents are \[1, 3, 16, 16\]"),
        ({"timesteps": [10, 5]}, "DDIMScheduler takes no timesteps of your own"),
        ({"callback_on_step_end": 3}, "callback_on_step_end=3 is int. Pass a function"),
        ({"callback_on_step_end_tensor_inputs": ["foo"]}, "cannot be called so"),
        ({"cross_attention_kwargs": 3}, "Pass a dictionary"),
        ({"clip_skip": -1}, "clip_skip=-1"),
    ],
)
def test_an_option_of_a_pipeline_that_means_nothing_is_refused(
    engine: str, changed: dict[str, Any], says: str
) -> None:
    model = zoo("tiny-sd", engine)
    refused(model, lambda: model.run(DRAW | changed), says)


ASK = {k: v for k, v in INPUTS["tiny-llava"].items() if k in ("text", "images")}
PAIRS = INPUTS["tiny-clip"]


def prepared(name: str, **changed: Callable[[Any], Any]) -> dict[str, Any]:
    ready = zoo(name, "hooked").prepare(**(ASK if name == "tiny-llava" else PAIRS))
    return ready | {key: change(ready[key]) for key, change in changed.items()}


def test_tokens_without_a_batch_axis_or_as_lists_are_refused_where_nnsight_does_not_take_them() -> None:
    model = zoo("tiny-llava", "hooked")
    for change, says in (
        (lambda x: x[0], r"reads \[row, token\]. Add the batch"),
        (lambda x: x.tolist(), "input_ids is list.*Pass text="),
    ):
        with pytest.raises(mm.InputError, match=says):
            model.run(prepared("tiny-llava", input_ids=change))


def test_tokens_without_a_batch_axis_or_as_lists_are_taken_where_nnsight_takes_them() -> None:
    model, ids = zoo("tiny-llava", "nnsight"), prepared("tiny-llava")["input_ids"]
    text_only = {"input_ids": ids[:, -5:]}
    want = model.run(text_only).output.logits
    for same in (text_only["input_ids"][0], text_only["input_ids"].tolist()):
        assert torch.equal(model.run({"input_ids": same}).output.logits, want)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (lambda: ASK | {"temperature": 0.5}, "does not take temperature="),
        (lambda: ASK | {"output_hidden_state": True}, "Did you mean output_hidden_states"),
        (lambda: {"text": ASK["text"], "image": ASK["images"]}, "Did you mean images"),
        (lambda: ASK | {"input_ids": torch.ones(1, 3).long()}, "text= and input_ids= were both given"),
        (lambda: {"use_cache": False}, "nothing to run on"),
        (lambda: prepared("tiny-llava", attention_mask=lambda x: x[:, :3]), "Pass one entry for each token"),
        (lambda: prepared("tiny-llava", attention_mask=lambda x: x[0]), "Pass one entry for each token"),
        (lambda: prepared("tiny-llava", input_ids=lambda x: x.float()), "input_ids is float32"),
        (lambda: prepared("tiny-llava", input_ids=lambda x: x + 10**6), "this model's vocabulary is 0 to"),
        (lambda: prepared("tiny-llava", pixel_values=lambda x: x.to(torch.uint8)), "pixel_values is uint8"),
        (lambda: prepared("tiny-llava", pixel_values=lambda x: [*ASK["images"]]), "Pass images="),
        (lambda: prepared("tiny-llava", pixel_values=lambda x: x.repeat(2, 1, 1, 1)), "image tokens, and"),
        (lambda: prepared("tiny-llava", input_ids=torch.zeros_like), "no token of input_ids stands for one"),
        (lambda: prepared("tiny-llava") | {"past_key_values": 3}, "past_key_values is int"),
        (lambda: prepared("tiny-llava") | {"position_ids": torch.zeros(1, 2).long()}, "position_ids is"),
    ],
)
def test_what_a_vision_language_model_cannot_read_is_refused(
    engine: str, inputs: Callable[[], dict[str, Any]], says: str
) -> None:
    model, given = zoo("tiny-llava", engine), inputs()
    refused(model, lambda: model.run(given), says)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temprature": 0.5}, "generate does not take temprature=. Did you mean temperature"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"do_sample": True, "temperature": -1.0}, "pass a number above 0"),
        ({"do_sample": True, "top_p": 3.0}, "from 0 to 1"),
    ],
)
def test_an_option_of_a_generation_that_means_nothing_is_refused(
    engine: str, options: dict[str, Any], says: str
) -> None:
    model = zoo("tiny-llava", engine)
    refused(model, lambda: model.generate(**ASK, **options), says)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_entry_names_what_it_does_not_take(engine: str) -> None:
    clip, sd = zoo("tiny-clip", engine), zoo("tiny-sd", engine)
    refused(clip, lambda: clip.run(PAIRS | {"texts": "a"}), "Did you mean text")
    refused(clip, lambda: clip.generate(**PAIRS), "CLIPModel generates nothing")
    refused(clip, lambda: clip.prepare(txt="a"), "prepare does not take txt=. Did you mean text")
    refused(clip, lambda: clip.layout(pixel_value=1), "Did you mean pixel_values")
    refused(sd, lambda: sd.layout(text="a", heigth=64), "Did you mean height")
    refused(clip, lambda: mm.wrap(clip.wrapped, procesor=1, engine=engine), "Did you mean processor")
    refused(clip, lambda: mm.load("tiny-clip", atn_implementation="eager", engine=engine), "attn_implem")
    refused(sd, lambda: mm.load("tiny-sd", varient="fp16", engine=engine), "Did you mean variant")
    refused(sd, lambda: mm.load("tiny-sd", varient="fp16", device="meta", engine=engine), "variant")
    open_clip = "open_clip:ViT-B-32/laion2b_s34b_b79k"
    refused(clip, lambda: mm.load(open_clip, cache_dirr="x", engine=engine), "Did you mean cache_dir")
    refused(sd, lambda: mm.load("tiny-sd", automodel="StableDifusionPipeline"), "StableDiffusionPipeline")


def test_the_default_engines_other_calls_name_what_they_do_not_take() -> None:
    clip, sd = zoo("tiny-clip", "hooked"), zoo("tiny-sd", "hooked")
    pixels = clip.prepare(images=PAIRS["images"])["pixel_values"]
    refused(clip, lambda: clip(**PAIRS, foo=1), "does not take foo=")
    refused(clip, lambda: clip.run_with_cache(**PAIRS, name_filter=None), "Did you mean names_filter")
    refused(clip, lambda: clip.run_with_hooks(**PAIRS, fwd_hook=[]), "Did you mean fwd_hooks")
    refused(clip, lambda: clip.embed(texts="a"), "embed does not take texts=")
    refused(clip, lambda: clip.vision(pixels, interpolate_pos_encodin=True), "interpolate_pos_encoding")
    refused(clip, lambda: clip(pixels, input_ids=pixels), "input_ids was given twice")
    refused(sd, lambda: sd.generate(**DRAW, foo=1), "does not take foo=")
    refused(sd, lambda: sd.run_with_cache(**DRAW | {"seed": 1.5}), "seed=1.5")


def test_the_nnsight_engines_other_calls_name_what_they_do_not_take() -> None:
    sd, clip = zoo("tiny-sd", "nnsight"), zoo("tiny-clip", "nnsight")
    refused(sd, lambda: sd.trace(**DRAW, foo=1), "does not take foo=")
    refused(sd, lambda: sd.trace(num_inference_steps=0), "num_inference_steps=0")
    refused(sd, lambda: sd.scan(**DRAW | {"seed": 1.5}), "seed=1.5")
    refused(sd, lambda: sd.generate(**DRAW | {"height": 0}), "height=0")
    refused(clip, lambda: clip.trace(**PAIRS, foo=1), "does not take foo=")

    def invoked() -> None:
        with clip.trace() as tracer:  # noqa: SIM117  nnsight captures each block.
            with tracer.invoke(**PAIRS, foo=1):
                clip.output.save()

    with nothing_runs(clip), pytest.raises(mm.InputError, match="does not take foo="):
        invoked()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_libraries_take_is_taken(engine: str) -> None:
    clip, llava, sd = (zoo(n, engine) for n in ("tiny-clip", "tiny-llava", "tiny-sd"))
    ready = clip.prepare(**PAIRS)
    own = clip.wrapped(**ready, output_hidden_states=True)
    output = clip.run(ready | {"output_hidden_states": True, "return_loss": False}).output
    assert torch.equal(output.text_model_output.hidden_states[1], own.text_model_output.hidden_states[1])
    assert llava.run(ASK | {"use_cache": False, "logits_to_keep": 1}).output.logits.shape[1] == 1
    tokens = llava.generate(**ASK, max_new_tokens=2, do_sample=False, repetition_penalty=1.1)
    ask = llava.prepare(**ASK)
    theirs = llava.wrapped.generate(**ask, max_new_tokens=2, do_sample=False, repetition_penalty=1.1)
    assert torch.equal(tokens, theirs)
    steps: list[int] = []

    def seen(pipe: Any, step: int, time: Any, kwargs: Any) -> Any:
        steps.append(step)
        return kwargs

    sd.run(DRAW | {"callback_on_step_end": seen, "cross_attention_kwargs": {}, "guidance_rescale": 0.1})
    assert steps == [0]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_side_alone_is_drawn_as_asked(engine: str) -> None:
    """Stable Diffusion leaves out both sides where one is missing."""
    sd = zoo("tiny-sd", engine)
    alone = sd.run(DRAW | {"height": 32}).output.images
    both = sd.wrapped(
        "a red circle", num_inference_steps=1, height=32, width=64, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert torch.equal(torch.as_tensor(alone), both)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_negative_prompt_is_that_of_every_prompt(engine: str) -> None:
    sd, prompts = zoo("tiny-sd", engine), ["a red circle", "a blue square"]
    one = sd.run(DRAW | {"prompt": prompts, "negative_prompt": "green", "seed": [0, 1]}).output.images
    each = sd.wrapped(
        prompts, negative_prompt=["green", "green"], num_inference_steps=1, output_type="latent",
        generator=[torch.Generator().manual_seed(i) for i in (0, 1)],
    ).images  # fmt: skip
    assert torch.equal(torch.as_tensor(one), each)


@pytest.mark.parametrize("engine", ENGINES)
def test_pictures_of_an_image_to_image_run_are_its_image(engine: str) -> None:
    case = td.image_to_image()
    model = mm.wrap(case.model, engine=engine)
    inputs = {k: v for k, v in case.inputs.items() if k != "image"}
    pictures = [Image.open(path).resize((16, 16)) for path in PAIRS["images"]]
    drawn = model.run(inputs | {"images": pictures}).output.images
    right = model.run(inputs | {"image": [p.convert("RGB") for p in pictures]}).output.images
    assert torch.equal(torch.as_tensor(drawn), torch.as_tensor(right))
    refused(
        model, lambda: model.run(inputs | {"images": pictures, "image": pictures}), "images= and image= were"
    )
    refused(model, lambda: model.run(inputs | {"image": "picture.png"}), "image='picture.png' is str")
    refused(model, lambda: model.run(inputs), "draws from a picture. Pass image=")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["dit", "kandinsky", "sana"])
def test_there_are_as_many_seeds_as_pictures_whatever_tells_how_many(name: str, engine: str) -> None:
    model, inputs = family(name, engine), tiny.CASES[name]().inputs
    refused(model, lambda: model.run(inputs | {"seed": [1, 2, 3]}), "There are 3 in seed for 2 pictures")
    if name == "dit":
        refused(model, lambda: model.run(inputs | {"class_labels": ["a"]}), r"class_labels\[0\]='a'")
    refused(
        model, lambda: model.run(inputs | {"latents": torch.zeros(3)}), r"latents are \[3\]|does not take"
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["guidance_scale", "eta", "num_inference_steps"])
def test_none_for_a_number_is_refused_and_for_what_may_be_none_is_not(name: str, engine: str) -> None:
    sd = zoo("tiny-sd", engine)
    refused(sd, lambda: sd.run(DRAW | {name: None}), f"{name}=None")
    given = sd.run(DRAW | {"height": None, "negative_prompt": None}).output.images
    assert torch.equal(torch.as_tensor(given), torch.as_tensor(sd.run(DRAW).output.images))


def test_a_pipeline_generates_by_its_call() -> None:
    sd = zoo("tiny-sd", "hooked")
    assert torch.equal(sd.generate(**DRAW).images, sd(**DRAW).images)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["flux", "stable_diffusion_3", "pixart", "kandinsky"])
def test_other_pipelines_refuse_alike(name: str, engine: str) -> None:
    model, inputs = family(name, engine), tiny.CASES[name]().inputs
    refused(model, lambda: model.run(inputs | {"num_inferance_steps": 2}), "num_inference_steps")
    refused(model, lambda: model.run(inputs | {"height": 0}), "height=0")
    refused(model, lambda: model.run(inputs | {"guidance_scale": NAN}), "guidance_scale=nan")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["qwen2_vl", "paligemma", "blip_2", "siglip", "open_clip", "dinov2"])
def test_other_models_refuse_alike(name: str, engine: str) -> None:
    model, inputs = family(name, engine), tiny.CASES[name]().inputs
    key = next(k for k in ("pixel_values", "image") if k in inputs)
    refused(model, lambda: model.run(inputs | {"foo": 1}), "does not take foo=")
    refused(model, lambda: model.run(inputs | {key: inputs[key] * NAN}), "NaN or infinite")
    refused(model, lambda: model.run(inputs | {key: ["a.png"]}), "Pass images=")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["dinov2", "dinov3", "beit", "align"])
def test_a_model_that_reads_any_size_is_given_it(name: str, engine: str) -> None:
    case = tiny.CASES[name]()
    model = mm.wrap(case.model, engine=engine)
    pixels = torch.nn.functional.interpolate(case.inputs["pixel_values"], size=(56, 42))
    inputs = case.inputs | {"pixel_values": pixels}
    with torch.no_grad():
        right = case.head(case.model(**inputs))
    assert torch.equal(case.head(model.run(inputs).output), right)


def test_paths_of_pictures_are_not_pixels(tmp_path: Path) -> None:
    model = zoo("tiny-clip", "hooked")
    refused(model, lambda: model.run({"pixel_values": str(tmp_path)}), "pixel_values is str.*Pass images=")
