"""How good each model of the zoo is, measured on scenes it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm_adapters.zoo import binding, captions, questions, world
from mm_adapters.zoo.captions import VALUES, Claim, Phrase, phrase_of

ATTRIBUTES = ("shape", "colour", "background", "position", "size")


@dataclass(frozen=True)
class Measure:
    """One number: what it is, its value in [0, 1], what it must reach, and over how many samples."""

    name: str
    value: float
    n: int
    at_least: float | None = None
    at_most: float | None = None

    def passes(self) -> bool:
        """Whether the value is within its bounds."""
        low = -np.inf if self.at_least is None else self.at_least
        high = np.inf if self.at_most is None else self.at_most
        return bool(low <= self.value <= high)

    def bound(self) -> str:
        """The bounds in words."""
        if self.at_least is not None:
            return f">= {self.at_least:.0%}"
        return "" if self.at_most is None else f"<= {self.at_most:.0%}"


def images_of(scenes: Sequence[world.Scene]) -> list[Image.Image]:
    """The scenes as pictures."""
    return [Image.fromarray(image) for image in world.render_batch(scenes)]


def prompts(attribute: str) -> list[str]:
    """One prompt for each value of the attribute, naming nothing else."""
    if attribute == "background":
        claims = [Claim((Phrase(),), background=value) for value in world.BACKGROUNDS]
    else:
        claims = [Claim((Phrase(**{attribute: value}),)) for value in VALUES[attribute]]
    return [claim.text("a photo of ") for claim in claims]


def values(attribute: str) -> tuple[str, ...]:
    """The attribute's values, in the order of `prompts`."""
    return tuple(world.BACKGROUNDS) if attribute == "background" else VALUES[attribute]


def value_of(scene: world.Scene, attribute: str) -> str:
    """What is true of a scene with one object."""
    return scene.background if attribute == "background" else getattr(scene.things[0], attribute)


# ---- tiny-clip ---------------------------------------------------------------------------------


@torch.no_grad()
def embed(
    model: Any, processor: Any, images: Sequence[Image.Image], texts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Unit vectors of the images and of the texts."""
    pixels = processor.image_processor(images=list(images), return_tensors="pt").pixel_values
    tokens = processor.tokenizer(list(texts), padding=True, return_tensors="pt")
    image = torch.cat(
        [model.get_image_features(part).pooler_output for part in pixels.to(model.dtype).split(250)]
    )
    text = torch.cat(
        [
            model.get_text_features(ids, attention_mask=mask).pooler_output
            for ids, mask in zip(tokens.input_ids.split(250), tokens.attention_mask.split(250), strict=True)
        ]
    )
    return torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(text, dim=-1)


def classify(model: Any, processor: Any, images: Sequence[Image.Image], attribute: str) -> list[str]:
    """What tiny-clip says of each image, choosing among the attribute's prompts."""
    image, text = embed(model, processor, images, prompts(attribute))
    return [values(attribute)[i] for i in (image @ text.T).argmax(-1).tolist()]


def measure_clip(model: Any, processor: Any, n: int = 2000) -> list[Measure]:
    """Zero-shot accuracy on one object, and telling apart captions with one thing swapped on two."""
    out = []
    for split, bound in (("test", 0.98), ("novel", None)):
        scenes = [world.scene(i, split, kind="one") for i in range(n if split == "test" else n // 4)]
        images = images_of(scenes)
        for attribute in ATTRIBUTES:
            answers_given = classify(model, processor, images, attribute)
            right = [
                word == value_of(scene, attribute) for word, scene in zip(answers_given, scenes, strict=True)
            ]
            name = f"{attribute}, zero-shot" + (", unseen shape-colour pairs" if split == "novel" else "")
            out.append(Measure(name, float(np.mean(right)), len(right), bound))
    names = ["colour", "shape"]
    out += [
        _choose_caption(model, processor, "colours swapped", _crossed("colour", "relation", names), n, 0.9),
        _choose_caption(
            model, processor, "colours swapped, joined by and", _crossed("colour", "and", names), n
        ),
        _choose_caption(model, processor, "relation turned", _turn_relation, n),
        _choose_caption(model, processor, "count off by one", _miscount, n // 2),
    ]
    for attribute, of_two in (
        ("colour", names),
        ("size", ["size", *names]),
        ("texture", ["texture", *names]),
    ):
        name = f"the other object's {attribute}, said of one of two alone"
        bound = 0.95 if attribute == "colour" else None
        out.append(_choose_caption(model, processor, name, _crossed(attribute, "single", of_two), n, bound))
    for attribute in ("size", "texture"):
        crossed = _crossed(attribute, "relation", [attribute, *names])
        out.append(_choose_caption(model, processor, f"{attribute}s swapped", crossed, n, 0.9))
    scenes = [world.scene(i, "test", 3, kind="one", any_radius=True) for i in range(n // 2)]
    given = classify(model, processor, images_of(scenes), "size")
    right = [word == scene.things[0].size for word, scene in zip(given, scenes, strict=True)]
    return [*out, Measure("size, zero-shot, at any radius", float(np.mean(right)), len(right))]


def _choose_caption(
    model: Any,
    processor: Any,
    name: str,
    make: Callable[[int], tuple[world.Scene, Claim, Claim] | None],
    n: int,
    bound: float | None = None,
) -> Measure:
    cases = [case for i in range(n) if (case := make(i)) is not None]
    scenes, right, wrong = zip(*cases, strict=True)
    texts = [claim.text("a photo of ") for claim in (*right, *wrong)]
    image, text = embed(model, processor, images_of(scenes), texts)
    good, bad = text.split(len(cases))
    value = ((image * good).sum(-1) > (image * bad).sum(-1)).float().mean().item()
    return Measure(f"true caption or the same with {name}", value, len(cases), bound)


def _crossed(
    attribute: str, form: str, named: Sequence[str]
) -> Callable[[int], tuple[world.Scene, Claim, Claim] | None]:
    """Makes scenes of two objects, what is true of one or both, and the same with the attribute swapped."""

    def make(index: int) -> tuple[world.Scene, Claim, Claim] | None:
        scene = world.scene(index, "test", kind="two")
        other = binding.crossed(scene, attribute)
        right, wrong = (binding.claim_of(s, form, named, index % 2) for s in (scene, other))
        return None if captions.is_true(wrong, scene) else (scene, right, wrong)

    return make


def _turn_relation(index: int) -> tuple[world.Scene, Claim, Claim] | None:
    scene = world.scene(index, "test", kind="two")
    right = binding.claim_of(scene, "relation", ["colour", "shape"], 0)
    assert right.relation is not None
    return scene, right, Claim(right.phrases, captions.OPPOSITE[right.relation])


def _miscount(index: int) -> tuple[world.Scene, Claim, Claim] | None:
    scene = world.scene(index, "test", kind="many")
    count, phrase = len(scene.things), phrase_of(scene.things[0], ["colour", "shape"])
    wrong = count + 1 if count == 2 or (index % 2 and count < world.MAX_OBJECTS) else count - 1
    return scene, Claim((phrase,), None, count), Claim((phrase,), None, wrong)


# ---- tiny-llava --------------------------------------------------------------------------------


@torch.no_grad()
def answers(
    model: Any, processor: Any, images: Sequence[Image.Image], asked: Sequence[questions.Question]
) -> list[str]:
    """What tiny-llava generates, greedily; "" if it does not stop by itself."""
    out = []
    for start in range(0, len(asked), 100):
        part = slice(start, start + 100)
        inputs = processor(
            images=list(images[part]),
            text=[q.prompt() for q in asked[part]],
            padding=True,
            return_tensors="pt",
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        written = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        stopped = (written == processor.tokenizer.eos_token_id).any(-1).tolist()
        texts = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        out += [text.strip() if stop else "" for text, stop in zip(texts, stopped, strict=True)]
    return out


def measure_llava(model: Any, processor: Any, n: int = 2000) -> list[Measure]:
    """Accuracy overall and by kind; what guessing reaches; what is left with another image."""
    cases = [questions.question(i, "test") for i in range(n)]
    images, asked = images_of([scene for scene, _ in cases]), [q for _, q in cases]
    answers_given = answers(model, processor, images, asked)
    right = np.array([word == q.answer for word, q in zip(answers_given, asked, strict=True)])
    out = [Measure("all questions", float(right.mean()), n, 0.95)]
    for kind in questions.KINDS:
        rows = [i for i, q in enumerate(asked) if q.kind == kind]
        out.append(Measure(f"questions of the kind {kind!r}", float(right[rows].mean()), len(rows)))
    pairs = [case for i in range(n // 2) if (case := questions.crossed_question(i)) is not None]
    asked_of_pairs = [q for _, q in pairs]
    given = answers(model, processor, images_of([scene for scene, _ in pairs]), asked_of_pairs)
    right_of_pairs = [word == q.answer for word, q in zip(given, asked_of_pairs, strict=True)]
    name = "is there the colour of one object in the shape of the other, or what there is"
    out.append(Measure(name, float(np.mean(right_of_pairs)), len(pairs), 0.9))
    many = [questions.question(i, "test")[1] for i in range(max(n, 4000))]
    out.append(Measure("best guess without looking", questions.best_guess_rate(many), len(many), at_most=0.2))
    blind = answers(model, processor, images[1:] + images[:1], asked)
    left = np.mean([word == q.answer for word, q in zip(blind, asked, strict=True)])
    out.append(Measure("all questions, each with another's image", float(left), n, at_most=0.25))
    return out
