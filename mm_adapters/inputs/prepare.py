"""Raw texts and images as the keyword arguments that a model's own forward takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from mm_adapters._errors import InputError
from mm_adapters.inputs.images import to_rgb_list
from mm_adapters.inputs.padding import POSITIONS, is_padded_left, row_positions
from mm_adapters.inputs.prepared import Readable
from mm_adapters.inputs.prompts import check_prompts
from mm_adapters.inputs.texts import as_texts, check_lengths, image_rows, interleave, token_counts
from mm_adapters.records.spec import Kind, ModelRecord

Side = Literal["left", "right"]

_HOW = {
    "tokenizer": "mm_adapters.wrap(model, tokenizer=...)",
    "image_processor": "mm_adapters.wrap(model, image_processor=...)",
    "processor": "mm_adapters.wrap(model, processor=...)",
}


@dataclass(frozen=True)
class Inputs:
    """What turns one model's texts and images into tensors. `Inputs` of nothing passes tensors only.

    `text_key`, `image_key`: the arguments of the model's forward ("" if it takes none). `accepts`:
    all that it takes; what a processor adds beyond it is dropped (None: keep all). `context`: the
    longest sequence, in tokens. `image_token` stands for an image in a text; a text that has none gets
    `image_prompt` in front for each, unless the processor makes places itself. `pad_to_context`: the
    model was trained on texts padded to their full length and reads the last position (SigLIP), so no
    attention mask is given. `counts_padding`: a decoder counts positions from the padding, unless it is
    told them. `reads`: what prepared tensors are checked against. `pipeline`, with its
    `record`, is whose text encoders a prompt is for.
    """

    kind: Kind
    processor: Any = None
    tokenizer: Any = None
    image_processor: Any = None
    context: int | None = None
    image_token: str | None = None
    image_prompt: str | None = None
    processor_places_images: bool = False
    text_key: str = "input_ids"
    image_key: str = "pixel_values"
    accepts: frozenset[str] | None = None
    pad_to_context: bool = False
    padding_side: Side | None = None
    counts_padding: bool = False
    reads: Readable = field(default_factory=Readable)
    pipeline: Any = field(default=None, repr=False)
    record: ModelRecord | None = field(default=None, repr=False)

    def prepare(
        self, *, text: Any = None, images: Any = None, padding_side: Side | None = None
    ) -> dict[str, Any]:
        """The keyword arguments of the model's forward, on the CPU (a pipeline's: its `prompt`).

        `text` is one string or several; `images` one or several, or, for a model of images and
        text, one list for each row of text. Rows of unequal length are padded at `padding_side`.

        Raises: InputError if there is nothing to prepare, a text is longer than the model reads,
        images and texts do not match, or the model lacks what is needed for one of them.
        """
        if text is None and images is None:
            raise InputError("Neither text nor images were given. Pass one of them, or tensors.")
        texts = None if text is None else as_texts(text)
        if self.kind == "diffusion":
            return self._prompts(texts, images)
        if self.kind == "vlm":
            return self._conversation(texts, images, padding_side)
        out: dict[str, Any] = {}
        if texts is not None:
            out |= self._text(texts, padding_side)
        if images is not None:
            out |= self._images(images)
        return out

    def prompts(self, text: Any, images: Any = None) -> list[str]:
        """Each row's text as the model is given it: with an image token for each of its images."""
        texts = as_texts(text)
        if self.image_token is None or images is None:
            return texts
        return interleave(texts, images, self.image_token, self.image_prompt)[0]

    def _text(self, texts: list[str], side: Side | None) -> dict[str, Any]:
        tokenizer = self._need("tokenizer", self.text_key, "text")
        lengths = token_counts(tokenizer, texts)
        check_lengths(texts, lengths, self.context)
        if not hasattr(tokenizer, "convert_ids_to_tokens"):  # One of open_clip's: it pads itself.
            return {self.text_key: tokenizer(texts)}
        options: dict[str, Any] = {"padding": False, "truncation": False}
        if self.pad_to_context:
            # Nothing is cut: the lengths were checked. Without it the tokenizer warns.
            options = {"padding": "max_length", "max_length": self.context, "truncation": True}
            batch = self.tokens(texts, side, **options)
            batch.pop("attention_mask", None)
            return batch
        if len(set(lengths)) > 1:
            self._need_pad_token(tokenizer)
            options["padding"] = True
        return self.tokens(texts, side, **options)

    def tokens(self, texts: list[str], side: Side | None = None, **options: Any) -> dict[str, Any]:
        """The tokens of texts, as a tokenizer of transformers makes them with its own `options`.

        Rows of unequal length are padded. Where a decoder would count padding at the left, each token's
        position comes with it.
        """
        tokenizer = self._need("tokenizer", self.text_key, "text")
        if len(texts) > 1 and "padding" not in options:
            rows = tokenizer(texts, **options)["input_ids"]
            if len({len(row) for row in rows}) > 1:
                self._need_pad_token(tokenizer)
                options["padding"] = True
        side = side or self.padding_side or ("right" if self.kind == "contrastive" else None)
        if side:
            options["padding_side"] = side
        batch = dict(tokenizer(texts, return_tensors="pt", **options))
        mask = batch.get("attention_mask")
        if self.counts_padding and mask is not None and is_padded_left(mask):
            batch[POSITIONS] = row_positions(mask)
        return self._accepted(batch)

    def _images(self, images: Any) -> dict[str, Any]:
        process = self._need("image_processor", self.image_key, "images")
        pictures = to_rgb_list(images)
        if not hasattr(process, "preprocess"):  # One of open_clip's or torchvision's transforms.
            return {self.image_key: torch.stack([process(p) for p in pictures])}
        return self._accepted(dict(process(pictures, return_tensors="pt")))

    def _conversation(self, texts: list[str] | None, images: Any, side: Side | None) -> dict[str, Any]:
        if texts is None:  # Images alone: the pixels are for the vision tower, which can run alone.
            return self._images(images)
        if images is None:
            token = self.image_token
            for i, text in enumerate(texts):
                if token and token in text:
                    raise InputError(f"text[{i}] has {token} and no images were given. Pass images.")
            return self._text(texts, side)
        if self.processor is None or (self.image_token is None and not self.processor_places_images):
            raise InputError(
                "This model has no processor, which puts the images' places into the text. "
                f"Pass it: {_HOW['processor']}, or pass tensors."
            )
        if self.image_token is None:
            prompts, rows = texts, image_rows(images, len(texts))
        else:
            prompts, rows = interleave(texts, images, self.image_token, self.image_prompt)
        pictures = [picture for row in rows for picture in row]
        options: dict[str, Any] = {"return_tensors": "pt"}
        if len(prompts) > 1:
            self._need_pad_token(self.processor.tokenizer)
            options["padding"] = True
        side = side or self.padding_side
        if side:
            options["padding_side"] = side
        in_rgb = iter(to_rgb_list(pictures) if pictures else ())
        # By rows: some processors count the images of each.
        images = {"images": [[next(in_rgb) for _ in row] for row in rows]} if pictures else {}
        batch = dict(self.processor(text=prompts, **images, **options))
        length = int(batch["input_ids"].shape[1])
        if self.context is not None and length > self.context:
            raise InputError(
                f"With its images the longest row is {length} tokens and this model reads at most "
                f"{self.context}. Shorten the text or pass fewer images."
            )
        return self._accepted(batch)

    def _prompts(self, texts: list[str] | None, images: Any) -> dict[str, Any]:
        if texts is None:
            raise InputError("This pipeline draws what a text says. Pass text.")
        if self.record is not None:
            check_prompts(self.pipeline, self.record, {"prompt": texts})
        if images is None:
            return {"prompt": texts}
        if not self.image_key:
            raise InputError("This pipeline makes images from text alone. Leave images out.")
        return {"prompt": texts, self.image_key: to_rgb_list(images)}

    def _need(self, part: str, key: str, what: str) -> Any:
        if not key:
            raise InputError(f"This model does not take {what}. Leave {what} out.")
        value = getattr(self, part)
        if value is None:
            raise InputError(
                f"This model has no {part}, so {what} cannot be prepared. "
                f"Pass one: {_HOW[part]}, or pass tensors: {key}=..."
            )
        return value

    def _need_pad_token(self, tokenizer: Any) -> None:
        if getattr(tokenizer, "pad_token", None) is None:
            raise InputError(
                "The texts differ in length and the tokenizer has no padding token. Set one, for "
                "example tokenizer.pad_token = tokenizer.eos_token, or pass one text at a time."
            )

    def _accepted(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in batch.items() if self.accepts is None or k in self.accepts}

    def check_prepared(self, arguments: Mapping[str, Any]) -> None:
        """Passes if tensors a user prepared can be what this model reads. Raises: as `Readable.check`."""
        self.reads.check(arguments)
