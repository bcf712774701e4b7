"""How well a diffusion pipeline draws what it is told, judged by rules on pixels and by tiny-clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from mm_adapters.zoo import binding, judges, world
from mm_adapters.zoo.captions import Claim, Phrase, phrase_of
from mm_adapters.zoo.measures import ATTRIBUTES, Measure, classify, value_of


def prompts_to_draw(n: int) -> list[tuple[world.Scene, str]]:
    """Held-out scenes with one object, and a prompt that says all that is judged."""
    scenes = [world.scene(i, "test", seed=7, kind="one", solid=True) for i in range(n)]
    claims = [
        Claim((phrase_of(s.things[0], ["size", "colour", "shape", "position"]),), None, None, s.background)
        for s in scenes
    ]
    return [(scene, claim.text()) for scene, claim in zip(scenes, claims, strict=True)]


def draw(
    pipeline: Any, texts: Sequence[str], steps: int = 25, guidance: float = 2.0, seed: int = 0
) -> list[Image.Image]:
    """One picture for each text; the picture with number i always starts from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(texts), 50):
        part = list(texts[start : start + 50])
        noise = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(part))]
        pictures += pipeline(part, num_inference_steps=steps, guidance_scale=guidance, generator=noise).images
    return pictures


def measure_sd(pipeline: Any, clip: Any, processor: Any, n: int = 300) -> list[Measure]:
    """How often each attribute of the prompt is in the picture, by tiny-clip and by exact rules."""
    cases = prompts_to_draw(n)
    images = draw(pipeline, [text for _, text in cases])
    judged = [judges.judge(np.asarray(image)) for image in images]
    out = []
    for attribute in ATTRIBUTES:
        expected = [value_of(scene, attribute) for scene, _ in cases]
        by_clip = classify(clip, processor, images, attribute)
        by_rule = [getattr(what, attribute) for what in judged]
        for judge, values_read in (("tiny-clip", by_clip), ("rules on pixels", by_rule)):
            value = float(np.mean([a == b for a, b in zip(values_read, expected, strict=True)]))
            out.append(Measure(f"{attribute}, judged by {judge}", value, n, 0.9))
    for name, asked in (
        ("short prompts", short_prompts(n)),
        ("prompts with two objects", two_object_prompts(n)),
    ):
        out += _measure_objects(pipeline, name, [claim for _, claim in asked], [scene for scene, _ in asked])
    return out


def _measure_objects(
    pipeline: Any, name: str, claims: Sequence[Claim], scenes: Sequence[world.Scene]
) -> list[Measure]:
    """How often a picture holds a claim's objects and no other, beside what the autoencoder lets through."""
    n = len(claims)
    drawn = [judges.objects(np.asarray(i)) for i in draw(pipeline, [c.text() for c in claims], seed=1)]
    through = [judges.objects(np.asarray(i)) for i in _through_autoencoder(pipeline, scenes)]
    others = [*claims[1:], *claims[:1]]
    out: list[Measure] = []

    def add(what: str, given: Sequence[Claim], seen: Sequence[Sequence[judges.Object]]) -> None:
        right = [shows(claim, one) for claim, one in zip(given, seen, strict=True)]
        out.append(Measure(f"{name}{what}: these objects and no other", float(np.mean(right)), len(right)))

    add("", claims, drawn)
    plain = [i for i, claim in enumerate(claims) if all("texture" not in p.named() for p in claim.phrases)]
    if len(plain) < n:
        add(" without a texture", [claims[i] for i in plain], [drawn[i] for i in plain])
    add(", another's", others, drawn)
    add(", their scenes through the autoencoder", claims, through)
    counted = [len(seen) == len(claim.phrases) for claim, seen in zip(claims, drawn, strict=True)]
    return [*out, Measure(f"{name}: as many objects", float(np.mean(counted)), n)]


@torch.no_grad()
def _through_autoencoder(pipeline: Any, scenes: Sequence[world.Scene]) -> list[Image.Image]:
    """The scenes' pictures as the autoencoder gives them back: nothing drawn can be nearer to them."""
    found: list[Image.Image] = []
    for start in range(0, len(scenes), 50):
        rendered = torch.from_numpy(world.render_batch(scenes[start : start + 50]))
        pixels = rendered.permute(0, 3, 1, 2).to(pipeline.vae.dtype) / 127.5 - 1
        back = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
        found += pipeline.image_processor.postprocess(back, output_type="pil")
    return found


def short_prompts(n: int) -> list[tuple[world.Scene, Claim]]:
    """Held-out scenes, and what says an object's colour and shape, every third its texture, and no more."""
    out = []
    for i in range(n):
        scene = world.scene(i, "test", seed=9, kind="one", solid=i % 3 != 0)
        named = ["colour", "shape"] + (["texture"] if i % 3 == 0 else [])
        out.append((scene, Claim((phrase_of(scene.things[0], named),))))
    return out


def two_object_prompts(n: int) -> list[tuple[world.Scene, Claim]]:
    """Held-out scenes, and what says the colours and shapes of their two objects and how they stand."""
    scenes = [world.scene(i, "test", seed=9, kind="two") for i in range(n)]
    return [
        (scene, binding.claim_of(scene, "relation", ["colour", "shape"], i % 2))
        for i, scene in enumerate(scenes)
    ]


def shows(claim: Claim, seen: Sequence[judges.Object]) -> bool:
    """Whether a picture holds the objects of the claim, standing so, and no other."""
    if len(seen) != len(claim.phrases):
        return False

    def fits(phrase: Phrase, what: judges.Object) -> bool:
        return all(getattr(phrase, name) == getattr(what, name) for name in phrase.named())

    def stand(first: judges.Object, second: judges.Object) -> bool:
        dx, dy = second.x - first.x, second.y - first.y
        sideways, along = {"left of": (dy, dx), "right of": (dy, -dx), "above": (dx, dy), "below": (dx, -dy)}[
            claim.relation or ""
        ]
        return along > abs(sideways)

    if len(seen) == 1:
        return fits(claim.phrases[0], seen[0])
    orders = (tuple(seen), tuple(reversed(seen)))
    a, b = claim.phrases
    return any(
        fits(a, x) and fits(b, y) and (claim.relation in (None, "and") or stand(x, y)) for x, y in orders
    )
