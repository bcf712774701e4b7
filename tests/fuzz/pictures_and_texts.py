"""Raw images and texts: every form that a user may hold, and what is none."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from mm_adapters.zoo import path, sample_images
from tests.fuzz.call import Call, Expect, Kind
from tests.fuzz.subjects import PICTURES, QUESTIONS, TEXTS, Subject, pictures

Form = tuple[str, Callable[[Image.Image, str], Any]]


def _tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


FORMS: tuple[Form, ...] = (
    ("PIL", lambda image, name: image),
    ("a path", lambda image, name: sample_images()[name]),
    ("a path as text", lambda image, name: str(sample_images()[name])),
    ("an array", lambda image, name: np.asarray(image)),
    ("an array in 0..1", lambda image, name: np.asarray(image) / 255),
    ("a tensor", lambda image, name: _tensor(image)),
    ("a tensor in 0..1", lambda image, name: _tensor(image).float() / 255),
    ("RGBA", lambda image, name: image.convert("RGBA")),
    ("16 bits", lambda image, name: np.asarray(image).astype(np.uint16) * 257),
    ("an array with strides", lambda image, name: np.asarray(image)[::-1][::-1]),
)
BAD_FORMS: tuple[tuple[str, Callable[[Image.Image], Any]], ...] = (
    ("no file", lambda image: "nowhere.png"),
    ("an address", lambda image: "https://example.org/a.png"),
    ("a folder", lambda image: str(path("tiny-clip"))),
    ("a file that is no image", lambda image: path("tiny-clip") / "config.json"),
    ("NaN", lambda image: np.full((64, 64, 3), np.nan)),
    ("int64", lambda image: np.asarray(image).astype(np.int64)),
    ("floats of 0..255", lambda image: np.asarray(image).astype(np.float32)),
    ("five channels", lambda image: torch.zeros(5, 64, 64)),
    ("two dimensions too many", lambda image: torch.zeros(1, 1, 3, 64, 64)),
    ("one dimension", lambda image: np.zeros(64)),
    ("empty", lambda image: np.zeros((0, 64, 3), np.uint8)),
    ("a number", lambda image: 3),
    ("None", lambda image: None),
    ("bytes", lambda image: b"\x89PNG"),
    ("channels last in torch", lambda image: torch.zeros(64, 64, 3)),
    ("a dictionary", lambda image: {"image": image}),
    ("bools", lambda image: np.ones((64, 64, 3), bool)),
    ("complex", lambda image: np.ones((64, 64, 3), complex)),
    ("an empty picture", lambda image: Image.new("RGB", (0, 4))),
    ("negative", lambda image: -np.ones((64, 64, 3))),
    ("infinite", lambda image: torch.full((3, 64, 64), float("inf"))),
    ("objects", lambda image: np.array([["a"]], dtype=object)),
)
BAD_TEXTS: tuple[tuple[str, Any], ...] = (
    ("[]", []), ("[None]", [None]), ("5", 5), ("b'red'", b"red"), ("[b'red']", [b"red"]), ("[1, 2]", [1, 2]),
    ("{}", {}), ("[['a']]", [["a"]]), ("np.zeros(2)", np.zeros(2)), ("too long", ["red " * 3000]),
    ("True", True), ("['a', None]", ["a", None]), ("float", 0.5), ("'\\ud800'", ["\ud800"]),
)  # fmt: skip


def _processor(subject: Subject) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(path(subject.name))


def preparing(rng: Random, subject: Subject) -> Call:
    """`prepare` of a picture in any form: the pixels that the library's own processor makes of it."""
    names = [rng.choice(PICTURES) for _ in range(rng.choice([1, 2]))]
    forms = [rng.choice(FORMS) for _ in names]
    plain = pictures(names)
    given = [form(image, name) for (_, form), image, name in zip(forms, plain, names, strict=True)]
    images = given[0] if len(given) == 1 and rng.random() < 0.5 else given

    def perform() -> dict[str, Any]:
        return {"pixel_values": subject.model.prepare(images=images)["pixel_values"]}

    def right() -> dict[str, Any]:
        made = _processor(subject).image_processor(images=plain, return_tensors="pt")
        return {"pixel_values": made["pixel_values"]}

    line = f"prepare(images={[(n, form[0]) for n, form in zip(names, forms, strict=True)]})"
    return Call("prepare", line, Expect.VALUE, subject, perform, right)


def embedding(rng: Random, subject: Subject) -> Call:
    """`embed` of a CLIP, and its towers called alone: the library's own features."""
    texts = [rng.choice(TEXTS) for _ in range(rng.choice([1, 2, 3]))]
    names = [rng.choice(PICTURES) for _ in range(rng.choice([1, 2]))]
    of_text, by_tower = rng.random() < 0.5, rng.random() < 0.4 and subject.engine == "hooked"
    model = subject.model

    def perform() -> dict[str, Any]:
        if of_text:
            given: Any = model.text(texts, return_type="embeds") if by_tower else _embedded(model, text=texts)
        else:
            images = pictures(names)
            pixels = model.prepare(images=images)["pixel_values"] if by_tower else images
            given = (
                model.vision(pixels, return_type="embeds") if by_tower else _embedded(model, images=pixels)
            )
        return {"embeddings": given}

    def right() -> dict[str, Any]:
        processor = _processor(subject)
        with torch.no_grad():
            if of_text:
                ready = processor(text=texts, padding=True, return_tensors="pt")
                return {"embeddings": _tensor_of(subject.plain.get_text_features(**ready))}
            ready = processor(images=pictures(names), return_tensors="pt")
            return {"embeddings": _tensor_of(subject.plain.get_image_features(**ready))}

    way = "tower call" if by_tower else "embed"
    line = f"{way} of {texts if of_text else names}"
    return Call("embed", line, Expect.VALUE, subject, perform, right)


def _embedded(model: Any, **given: Any) -> Any:
    if hasattr(model, "embed"):
        return model.embed(**given)
    # Of one side alone its tower is run.
    return _tensor_of(model.run(given).output)


def _tensor_of(features: Any) -> torch.Tensor:
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def bad_picture(rng: Random, subject: Subject) -> Call:
    """A picture that is none, alone or beside a good one."""
    name = rng.choice(PICTURES)
    image = pictures([name])[0]
    shown, form = rng.choice(BAD_FORMS)
    n = rng.choice([1, 2])
    images: Any = [form(image)] if n == 1 else [image, form(image)]
    text = [rng.choice(QUESTIONS)] * n
    count = rng.random()
    if subject.kind == "vlm" and count < 0.15:
        images, shown = [image] * (n + 2), "more images than rows"
    elif count < 0.2:
        images, shown = [], "no image"
    ways: dict[str, Callable[[], Any]] = {
        "prepare": lambda: subject.model.prepare(text=text, images=images),
        "run": lambda: subject.model.run({"text": text, "images": images}),
        "layout": lambda: subject.model.layout(text=text, images=images),
    }
    way = rng.choice(sorted(ways))

    def perform() -> dict[str, Any]:
        return {"answer": str(type(ways[way]()))}

    return Call("bad picture", f"{way} with {shown}, {n} rows", Expect.REFUSAL, subject, perform)


def bad_text(rng: Random, subject: Subject) -> Call:
    """A text that is none."""
    shown, text = rng.choice(BAD_TEXTS)
    key = "prompt" if subject.is_pipeline else "text"
    more: dict[str, Any] = {"num_inference_steps": 1} if subject.is_pipeline else {}
    ways: dict[str, Callable[[], Any]] = {
        "run": lambda: subject.model.run({key: text} | more),
        "prepare": lambda: subject.model.prepare(text=text),
        "layout": lambda: subject.model.layout(text=text),
    }
    if subject.engine == "hooked" and subject.kind == "contrastive":
        ways["embed"] = lambda: subject.model.embed(text=text)
        ways["embed of both"] = lambda: subject.model.embed(text=["a"], images=pictures(PICTURES[:1]))
        ways["embed of neither"] = lambda: subject.model.embed()
    way = rng.choice(sorted(ways))

    def perform() -> dict[str, Any]:
        return {"answer": str(type(ways[way]()))}

    return Call("bad text", f"{way}({key}={shown})", Expect.REFUSAL, subject, perform)


KINDS = (
    Kind(preparing, fits=lambda s: s.raw and not s.is_pipeline, weight=1),
    Kind(embedding, fits=lambda s: s.name == "tiny-clip", weight=2),
    Kind(bad_picture, fits=lambda s: s.raw and not s.is_pipeline, weight=1),
    Kind(bad_text, fits=lambda s: s.raw, weight=0.8),
)
