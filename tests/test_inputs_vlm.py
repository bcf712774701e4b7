"""Raw text and images for vision-language models whose processors differ in what a text must have."""

from __future__ import annotations

from typing import Any

import numpy as np
import tiny_vlm
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import mm_adapters as mm

SPECIAL = {
    0: "<pad>",
    1: "<s>",
    2: "</s>",
    59: "<|image_pad|>",
    60: "<|video_pad|>",
    61: "<|vision_start|>",
    62: "<|vision_end|>",
}


def tokenizer() -> Any:
    names = {SPECIAL.get(i, f"w{i}"): i for i in range(64)}
    made = Tokenizer(models.WordLevel(names, unk_token="w63"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", additional_special_tokens=list(SPECIAL.values())[3:]
    )


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    made = np.random.default_rng(0)
    return [Image.fromarray(made.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


def test_a_text_without_marks_gets_its_image_as_the_family_writes_it() -> None:
    images = hf.Qwen2VLImageProcessor(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 16, "longest_edge": 4096}
    )
    processor = hf.Qwen2VLProcessor(images, tokenizer(), hf.Qwen2VLVideoProcessor())
    case = tiny_vlm.qwen2_vl()
    model = mm.wrap(case.model, processor=processor)
    given = {"text": ["w5 w7", "w9"], "images": pictures((16, 24), (16, 16))}
    ids = model.prepare(**given)["input_ids"].tolist()
    assert [t for t in ids[0] if t] == [61, *[59] * 6, 62, 5, 7]
    assert [t for t in ids[1] if t] == [61, *[59] * 4, 62, 9]
    layout = model.layout(**given)["language"]
    assert [layout.patch_rc(p) for p in layout.positions("image")] == [
        (r, c) for r in (0, 1) for c in range(3)
    ]
    assert len(layout.where("w7")) == 1
    with torch.no_grad():
        assert torch.isfinite(model(**given).logits).all()


def test_a_processor_that_keeps_images_out_of_the_text_is_given_it_as_it_is() -> None:
    images = hf.BlipImageProcessor(size={"height": 8, "width": 8})
    model = mm.wrap(tiny_vlm.blip().model, processor=hf.BlipProcessor(images, tokenizer()))
    given = {"text": ["w5 w7", "w9"], "images": pictures((16, 24), (16, 16))}
    ready = model.prepare(**given)
    assert ready["input_ids"].tolist() == [[5, 7], [9, 0]]
    assert ready["pixel_values"].shape == (2, 3, 8, 8)
    found = model.layout(**given)
    assert found["language"].where("w7") == [1]
    assert found["vision"].grid == (2, 2)
    with torch.no_grad():
        assert torch.isfinite(model(**given).logits).all()
