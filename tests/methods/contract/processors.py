"""What prepares raw texts and images for the tiny families, so that methods can be given either."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

import numpy as np
import tiny
import torch
import transformers as hf
from PIL import Image
from tiny_vlm import IMAGE
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torchvision import transforms

import mm_adapters as mm
from tests.methods.contract.kinds import kind_of

START, END = 58, 59
TEXTS = ("a cat", "a dog")
QUESTION = "w5 w7"
_OF_ANSWERS = ("decoder_input_ids", "labels")  # Which no processor makes.


def pictures(n: int = 2) -> list[Image.Image]:
    """Pictures of noise, each its own."""
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 255, (28, 28, 3), dtype=np.uint8)) for _ in range(n)]


def of(name: str, sites: mm.SiteMap, case: tiny.Case) -> dict[str, Any]:
    """The arguments of `mm.wrap` with which a family takes raw texts and images; none for a pipeline."""
    kind = kind_of(sites)
    if kind == "vlm":
        return {"processor": CannedProcessor(case.inputs, sites)}
    if kind not in ("contrastive", "vision", "text"):
        return {}
    parts: dict[str, Any] = {}
    if "vision" in sites.towers:
        key = sites.towers["vision"].input_name
        parts["image_processor"] = _images(name, case.inputs[key].shape[-1], key)
    if kind != "vision":
        parts["tokenizer"] = OpenClipLetters() if "text" in case.inputs else letters()
    return parts


def _images(name: str, size: int, key: str) -> Any:
    if name == "siglip2":
        return hf.Siglip2ImageProcessor(patch_size=4, max_num_patches=6)
    if key != "pixel_values":  # Of open_clip, timm or torchvision, which transform pictures.
        return transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()])
    square = {"height": size, "width": size}
    return hf.CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False)


@cache
def letters() -> Any:
    """A CLIP tokenizer whose tokens are letters, with the start and end that the tiny text towers know."""
    pieces = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    pieces += [f"unused{i}" for i in range(START - len(pieces))]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return hf.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


class OpenClipLetters:
    """The same in open_clip's manner: a call gives padded ids."""

    sot_token_id, eot_token_id = START, END
    all_special_ids = (START, END)

    @property
    def encoder(self) -> dict[str, int]:
        """Ids by token."""
        return letters().get_vocab()

    @property
    def decoder(self) -> dict[int, str]:
        """Tokens by id."""
        return {i: piece for piece, i in self.encoder.items()}

    def encode(self, text: str) -> list[int]:
        """A text's tokens, without a start or an end."""
        return letters()(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens."""
        return letters().decode(ids)

    def __call__(self, texts: list[str]) -> Tensor:
        rows = torch.zeros(len(texts), 8, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [START, *self.encode(text), END]
            row[: len(ids)] = torch.tensor(ids)
        return rows


@cache
def words() -> Any:
    """A tokenizer of the words w0, w1, ... for language towers."""
    special = {0: "<pad>", 1: "<s>", 2: "</s>"}
    vocab = {special.get(i, f"w{i}"): i for i in range(128)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="w127"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="w127"
    )


class CannedImages:
    """Pictures as the tiny case's own pixels, moved by what the pictures hold."""

    image_mean = image_std = None

    def __init__(self, pixels: dict[str, Tensor]) -> None:
        self.pixels = pixels

    def preprocess(self, images: list[Image.Image], **options: Any) -> dict[str, Tensor]:
        """The case's image arguments."""
        seed = int(sum(np.asarray(image).astype(int).sum() for image in images))
        noise = torch.Generator().manual_seed(seed)

        def moved(value: Tensor) -> Tensor:  # What is zero is padding.
            return value + torch.randn(value.shape, generator=noise) * (value != 0)

        return {k: moved(v) if v.is_floating_point() else v for k, v in self.pixels.items()}

    __call__ = preprocess


class CannedProcessor:
    """Stands in for the processors of thirty families of vision-language models.

    Whatever it is asked, the ids are those of the tiny case; the pixels depend on the pictures.
    """

    image_token = "<image>"

    def __init__(self, inputs: dict[str, Any], sites: mm.SiteMap) -> None:
        self.inputs = {k: v for k, v in first_row(inputs).items() if k not in _OF_ANSWERS}
        self.tokenizer = words()
        image = {k: v for k, v in self.inputs.items() if k not in ("input_ids", "attention_mask")}
        self.image_processor = CannedImages(image)

    def __call__(self, text: list[str], images: list[list[Image.Image]], **options: Any) -> dict[str, Any]:
        return self.inputs | self.image_processor([picture for row in images for picture in row])


def first_row(inputs: dict[str, Any]) -> dict[str, Any]:
    """The first row of a model's arguments."""
    rows = {k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in inputs.items()}
    pixels, ids = inputs.get("pixel_values"), inputs.get("input_ids")
    if "image_token_pooling" in inputs:  # Whose patches are told by number across rows.
        return inputs
    if "image_grid_thw" in inputs:  # The patches of all images are one row.
        rows["pixel_values"] = pixels[: int(inputs["image_grid_thw"][0].prod())]
    elif pixels is not None and ids is not None and len(pixels) != len(ids):  # Tiles, with a token each.
        rows["pixel_values"] = pixels[: int((ids[0] == IMAGE).sum())]
    return rows
