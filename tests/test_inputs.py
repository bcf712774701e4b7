"""Raw texts and images become what the library's own processor gives, or one clear error."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny_tokenizers as made_here
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipConfig,
    SiglipModel,
)

from mm_adapters._errors import InputError
from mm_adapters.inputs.from_model import inputs_for
from mm_adapters.inputs.prepare import Inputs

_SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION = {**_SIZE, "image_size": 28, "patch_size": 14}
RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (20, 50), "blue")
PICTURES = [RED, BLUE]


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


@cache
def clip() -> tuple[CLIPModel, CLIPProcessor]:
    tokenizer = made_here.clip()
    text = {**_SIZE, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=8)
    return CLIPModel(config).eval(), CLIPProcessor(image_processor(), tokenizer)


@cache
def llava(side: str = "left") -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    tokenizer = made_here.llama()
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(
            **_SIZE,
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=image,
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        image_processor(),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return LlavaForConditionalGeneration(config).eval(), processor


def same(ours: dict[str, Any], theirs: Any) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("texts", [["a red circle", "a small blue square, right"], ["one"], [""]])
def test_clip_gets_what_its_own_processor_gives(texts: list[str]) -> None:
    model, processor = clip()
    inputs = inputs_for(model, processor=processor)
    both = inputs.prepare(text=texts, images=PICTURES)
    assert same(both, processor(text=texts, images=PICTURES, padding=True, return_tensors="pt"))
    assert same(inputs.prepare(text=texts), processor.tokenizer(texts, padding=True, return_tensors="pt"))
    assert same(inputs.prepare(images=RED), processor.image_processor(RED, return_tensors="pt"))
    assert model(**both).logits_per_image.shape == (2, len(texts))


def test_a_tokenizer_and_an_image_processor_do_for_a_processor() -> None:
    model, processor = clip()
    parts = inputs_for(model, tokenizer=processor.tokenizer, image_processor=processor.image_processor)
    whole = inputs_for(model, processor=processor)
    assert same(parts.prepare(text="a", images=RED), whole.prepare(text=["a"], images=[RED]))
    for part, other in ((processor.tokenizer, "images"), (processor.image_processor, "text")):
        alone = inputs_for(model, processor=part)  # As AutoProcessor may return it.
        with pytest.raises(InputError, match=f"so {other} cannot be prepared"):
            alone.prepare(text="a", images=RED)


def test_any_picture_gives_what_its_rgb_gives() -> None:
    model, processor = clip()
    inputs = inputs_for(model, processor=processor)
    want = inputs.prepare(images=RED)["pixel_values"]
    for image in (RED.convert("P"), RED.convert("RGBA"), np.asarray(RED), np.asarray(RED) / 255):
        assert torch.equal(inputs.prepare(images=image)["pixel_values"], want)


def test_a_text_as_long_as_the_context_passes_and_one_longer_says_both_lengths() -> None:
    model, processor = clip()
    inputs = inputs_for(model, processor=processor)
    assert inputs.prepare(text="red " * 75)["input_ids"].shape == (1, 77)
    with pytest.raises(InputError, match=r"text\[1\] is 78 tokens long.*reads at most 77"):
        inputs.prepare(text=["red", "red " * 76])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "Neither text nor images"),
        ({"text": []}, 'text is empty. Pass at least one string; "" is one'),
        ({"text": ["a", 3]}, r"text\[1\] is int \(3\), not a string"),
        ({"text": ["a", None]}, r"text\[1\] is NoneType"),
        ({"text": 3}, "text is int. Pass a string"),
        ({"text": b"a"}, "text is bytes. Pass a string"),
        ({"images": []}, "images is empty"),
        ({"images": [RED, "missing.png"]}, r"images\[1\]: There is no file at missing.png"),
        ({"images": np.full((4, 4, 3), np.nan)}, "NaN"),
    ],
)
def test_bad_input_is_one_clear_error(given: dict[str, Any], says: str) -> None:
    model, processor = clip()
    with pytest.raises(InputError, match=says):
        inputs_for(model, processor=processor).prepare(**given)


def test_a_model_without_a_processor_says_how_to_pass_one() -> None:
    inputs = inputs_for(clip()[0])
    with pytest.raises(InputError, match=r"no tokenizer.*wrap\(model, tokenizer=...\).*input_ids=..."):
        inputs.prepare(text="a")
    with pytest.raises(InputError, match=r"no image_processor.*wrap\(model, image_processor=...\)"):
        inputs.prepare(images=RED)
    with pytest.raises(InputError, match=r"no processor.*wrap\(model, processor=...\)"):
        inputs_for(llava()[0]).prepare(text="a", images=RED)


def test_a_tower_alone_takes_only_what_it_reads() -> None:
    _, processor = clip()
    vision = CLIPVisionModel(CLIPVisionConfig(**_VISION))
    inputs = inputs_for(vision, processor=processor)
    assert set(inputs.prepare(images=PICTURES)) == {"pixel_values"}
    with pytest.raises(InputError, match="does not take text"):
        inputs.prepare(text="a")
    text = CLIPTextModel(CLIPTextConfig(**_SIZE))
    inputs = inputs_for(text, processor=processor)
    assert inputs.context == 77
    assert set(inputs.prepare(text="a")) == {"input_ids", "attention_mask"}
    with pytest.raises(InputError, match="does not take images"):
        inputs.prepare(images=RED)


def test_siglip_texts_fill_the_context_and_have_no_mask(tmp_path: Any) -> None:
    tokenizer = made_here.siglip(tmp_path)
    text = {**_SIZE, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION)).eval()
    inputs = inputs_for(model, tokenizer=tokenizer, image_processor=image_processor())
    assert inputs.pad_to_context
    made = inputs.prepare(text=["a red circle", "red"], images=RED)
    assert set(made) == {"input_ids", "pixel_values"}
    theirs = tokenizer(["a red circle", "red"], padding="max_length", max_length=24, return_tensors="pt")
    assert torch.equal(made["input_ids"], theirs["input_ids"])
    alone = inputs.prepare(text="red")["input_ids"]
    assert torch.equal(alone[0], made["input_ids"][1])  # Each text is read alike in any company.
    with pytest.raises(InputError, match="reads at most 24"):
        inputs.prepare(text="red " * 24)


def test_open_clip_gets_its_own_tokens_and_transform() -> None:
    import open_clip

    tokenizer = made_here.open_clip_simple()
    transform = open_clip.image_transform(28, is_train=False)
    vision = {"image_size": 28, "layers": 1, "width": 16, "patch_size": 14, "head_width": 8}
    text = {"context_length": 77, "vocab_size": tokenizer.vocab_size, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(8, vision, text).eval()
    inputs = inputs_for(model, tokenizer=tokenizer, image_processor=transform)
    made = inputs.prepare(text=["a red circle", "!"], images=PICTURES)
    assert torch.equal(made["text"], tokenizer(["a red circle", "!"]))
    assert torch.equal(made["image"], torch.stack([transform(p) for p in PICTURES]))
    assert model(**made)[0].shape == (2, 8)
    assert inputs.prepare(text="red " * 75)["text"].shape == (1, 77)
    with pytest.raises(InputError, match="is 78 tokens long"):
        inputs.prepare(text="red " * 76)
    assert (inputs.reads.image_size, inputs.reads.n_channels) == ((28, 28), 3)
    with pytest.raises(InputError, match="image is 30 x 28 pixels and this model reads 28 x 28"):
        inputs.check_prepared({"image": torch.zeros(1, 3, 30, 28)})


def test_a_question_gets_an_image_token_for_each_of_its_images() -> None:
    model, processor = llava()
    inputs = inputs_for(model, processor=processor)
    made = inputs.prepare(text="what colour?", images=RED)
    theirs = processor(text="<image>\nwhat colour?", images=RED, return_tensors="pt")
    assert same(made, {k: theirs[k] for k in made})
    assert (made["input_ids"] == model.config.image_token_id).sum() == 4
    assert model(**made).logits.shape[1] == made["input_ids"].shape[1]
    written = inputs.prepare(text="what <image> colour?", images=[RED])
    assert (written["input_ids"] == model.config.image_token_id).sum() == 4
    assert not torch.equal(written["input_ids"], made["input_ids"])
    assert inputs.prompts("a", [RED]) == ["<image>\na"]
    assert inputs.prompts(["a", "b"], [[RED, BLUE], []]) == ["<image>\n<image>\na", "b"]
    assert inputs.prompts("a") == ["a"]


def test_rows_with_different_numbers_of_images_keep_them_in_order() -> None:
    model, processor = llava()
    inputs = inputs_for(model, processor=processor)
    made = inputs.prepare(text=["which is red?", "how many?", "two"], images=[[RED, BLUE], [], (BLUE,)])
    token = model.config.image_token_id
    assert (made["input_ids"] == token).sum(1).tolist() == [8, 0, 4]
    want = [inputs.prepare(text="a", images=i)["pixel_values"][0] for i in (RED, BLUE, BLUE)]
    assert torch.equal(made["pixel_values"], torch.stack(want))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_where_it_is_asked_and_leaves_the_tokenizer_alone(side: Any) -> None:
    model, processor = llava()
    before = processor.tokenizer.padding_side
    inputs = inputs_for(model, processor=processor)
    made = inputs.prepare(text=["a", "what colour is the circle?"], images=PICTURES, padding_side=side)
    mask = made["attention_mask"][0]
    assert mask[0 if side == "left" else -1] == 0
    assert mask[-1 if side == "left" else 0] == 1
    assert processor.tokenizer.padding_side == before
    row = inputs.prepare(text="a", images=RED)["input_ids"][0]
    assert torch.equal(made["input_ids"][0][mask.bool()], row)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"text": "a", "images": PICTURES}, "2 images for 1 rows of text"),
        ({"text": ["a", "b"], "images": RED}, "1 images for 2 rows"),
        ({"text": ["a", "b"], "images": [[RED]]}, "1 lists of images for 2 rows"),
        ({"text": ["a", "b"], "images": [[RED], BLUE]}, "mixes images and lists"),
        ({"text": "a", "images": []}, "images is empty"),
        ({"text": "<image><image>", "images": RED}, r"text\[0\] has 2 <image> and 1 images"),
        ({"text": "<image> a"}, r"text\[0\] has <image> and no images were given"),
        ({"text": "red " * 80, "images": RED}, "reads at most 64"),
        ({"text": "red " * 80}, "reads at most 64"),
    ],
)
def test_images_and_questions_that_do_not_match_say_how_many(given: dict[str, Any], says: str) -> None:
    model, processor = llava()
    with pytest.raises(InputError, match=says):
        inputs_for(model, processor=processor).prepare(**given)


def test_a_question_without_an_image_is_text_alone() -> None:
    model, processor = llava()
    made = inputs_for(model, processor=processor).prepare(text=["a red circle", "a"])
    assert set(made) == {"input_ids", "attention_mask"}


def test_without_a_padding_token_rows_of_one_length_pass_and_others_say_what_to_do() -> None:
    tokenizer = made_here.qwen()
    inputs = Inputs("tower", tokenizer=tokenizer)
    pad, tokenizer.pad_token = tokenizer.pad_token, None
    try:
        assert inputs.prepare(text=["a red", "a red"])["input_ids"].shape[0] == 2
        with pytest.raises(InputError, match=r"tokenizer.pad_token = tokenizer.eos_token"):
            inputs.prepare(text=["a", "a red circle"])
    finally:
        tokenizer.pad_token = pad


@cache
def drawn() -> Any:
    from tiny import stable_diffusion

    return stable_diffusion().model


def test_a_prompt_that_every_text_encoder_cuts_is_refused() -> None:
    inputs = inputs_for(drawn())
    assert inputs.prepare(text="a cat") == {"prompt": ["a cat"]}
    with pytest.raises(InputError, match=r"text\[1\] is 42 tokens long.*at most 16"):
        inputs.prepare(text=["a", "cat " * 13 + "x"])
    with pytest.raises(InputError, match="Pass text"):
        inputs.prepare(images=RED)
    with pytest.raises(InputError, match="from text alone"):
        inputs.prepare(text="a", images=RED)
    pictures = Inputs("diffusion", image_key="image").prepare(text="a", images=RED)
    assert [i.size for i in pictures["image"]] == [(40, 30)]


def ok(**changed: Any) -> dict[str, Any]:
    return {"pixel_values": torch.zeros(2, 3, 28, 28), "input_ids": torch.ones(2, 5).long()} | changed


BROKEN = torch.zeros(2, 3, 28, 28)
BROKEN[1, 2, 3, 4] = torch.nan


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (ok(pixel_values=BROKEN), "pixel_values has values that are NaN"),
        (ok(pixel_values=BROKEN.half()), "NaN or infinite"),
        (
            ok(pixel_values=torch.zeros(2, 1, 28, 28)),
            r"with 1 channels, and this model reads \[batch, 3, 28, 28\]",
        ),
        (ok(pixel_values=torch.zeros(2, 3, 32, 28)), "32 x 28 pixels and this model reads 28 x 28"),
        (ok(pixel_values=torch.zeros(3, 28, 28)), "Add the batch axis"),
        (ok(pixel_values=torch.zeros(0, 3, 28, 28)), "pixel_values is empty"),
        (
            ok(input_ids=torch.ones(1, 78).long()),
            "input_ids has 78 tokens a row and this model reads at most 77",
        ),
    ],
)
def test_prepared_tensors_that_cannot_be_read_are_refused(given: dict[str, Any], says: str) -> None:
    inputs = inputs_for(clip()[0])
    inputs.check_prepared(ok())
    with pytest.raises(InputError, match=says):
        inputs.check_prepared(given)


def test_prepared_tensors_of_another_size_pass_where_the_model_is_told_to_stretch() -> None:
    inputs = inputs_for(clip()[0])
    big = torch.zeros(1, 3, 56, 56)
    inputs.check_prepared({"pixel_values": big, "interpolate_pos_encoding": True})
    Inputs("tower").check_prepared({"pixel_values": big})
