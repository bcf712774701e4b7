"""The models that calls are made on, each beside a copy that this package never touches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch

from tests.fuzz.pipelines import flux, heun, sd3, tiny_sd
from tests.fuzz.probes import Probe
from tests.fuzz.subjects import PICTURES, QUESTIONS, TEXTS, Given, Subject, pictures, wrapped


def _clip_probes() -> tuple[Probe, ...]:
    vision, text = "vision_model.encoder.layers", "text_model.encoder.layers"
    return (
        Probe("vision.blocks.1.hook_resid_post", f"{vision}.1", needs="images"),
        Probe("vision.blocks.0.hook_mlp_out", f"{vision}.0.mlp", needs="images"),
        Probe("vision.blocks.1.attn.hook_q", f"{vision}.1.self_attn.q_proj", heads=4, needs="images"),
        Probe("text.blocks.1.hook_resid_pre", f"{text}.1", "in", needs="text"),
        Probe("text.blocks.1.hook_attn_out", f"{text}.1.self_attn", needs="text"),
        Probe("text.blocks.0.hook_resid_post", f"{text}.0", needs="text"),
    )


def _clip(engine: str) -> Subject:
    from transformers import AutoProcessor, CLIPModel

    import mm_adapters as mm
    from mm_adapters.zoo import path

    plain = CLIPModel.from_pretrained(path("tiny-clip"), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path("tiny-clip"))
    heads = _heads(plain.config.vision_config)

    def draw(rng: Random) -> Given:
        n = rng.choice([1, 2, 3])
        texts = [rng.choice(TEXTS) for _ in range(n)]
        names = [rng.choice(PICTURES) for _ in range(n)]
        images = pictures(names)
        ready = processor(text=texts, images=images, padding=True, return_tensors="pt")
        given = {"text": texts, "images": images}
        return Given(given, dict(ready), n, f"{{'text': {texts}, 'images': {names}}}")

    probes = tuple(_with_heads(p, heads) for p in _clip_probes())
    model: Any = mm.load("tiny-clip", device="cpu", engine=engine)
    return Subject(
        "tiny-clip", engine, model, plain, probes, draw, lambda o: o.logits_per_image, "contrastive", raw=True
    )


def _heads(config: Any) -> int:
    return config.num_attention_heads


def _with_heads(probe: Probe, heads: int) -> Probe:
    return replace(probe, heads=heads) if probe.heads else probe


def _llava(engine: str) -> Subject:
    from transformers import LlavaForConditionalGeneration

    import mm_adapters as mm
    from mm_adapters.zoo import path

    plain = LlavaForConditionalGeneration.from_pretrained(path("tiny-llava"), dtype=torch.float32).eval()
    model: Any = mm.load("tiny-llava", device="cpu", engine=engine)
    heads = _heads(plain.config.text_config)
    layers = "model.language_model.layers"

    def draw(rng: Random) -> Given:
        n = rng.choice([1, 2, 2])
        texts = [rng.choice(QUESTIONS) for _ in range(n)]
        names = [rng.choice(PICTURES) for _ in range(n)]
        given = {"text": texts, "images": pictures(names)}
        ready = dict(model.prepare(**given))
        if rng.random() < 0.3:
            given = ready
        return Given(given, ready, n, f"{{'text': {texts}, 'images': {names}}}")

    probes = (
        Probe("language.blocks.1.hook_resid_post", f"{layers}.1"),
        Probe("language.blocks.1.hook_resid_pre", f"{layers}.1", "in"),
        Probe("language.blocks.0.hook_mlp_out", f"{layers}.0.mlp"),
        Probe("language.blocks.1.attn.hook_z", f"{layers}.1.self_attn.o_proj", "in", heads=heads),
        Probe("language.blocks.0.attn.hook_q", f"{layers}.0.self_attn.q_proj", heads=heads),
        Probe("vision.blocks.0.hook_resid_post", "model.vision_tower.encoder.layers.0", needs="images"),
        Probe("projector.hook_out", "model.multi_modal_projector", needs="images"),
    )
    return Subject(
        "tiny-llava", engine, model, plain, probes, draw, lambda o: o.logits, "vlm", raw=True, generates=True
    )


def _fixed(case: Any, rows: int, text: str, **more: Any) -> Callable[[Random], Given]:
    return lambda rng: Given(dict(case.inputs), dict(case.inputs), rows, text, **more)


def _qwen2_vl(engine: str) -> Subject:
    def build() -> Any:
        import tiny_vlm

        return tiny_vlm.qwen2_vl()

    model, case, plain = wrapped(engine, build)
    layers = "model.language_model.layers"
    probes = (
        Probe("language.blocks.1.hook_resid_post", f"{layers}.1"),
        Probe("language.blocks.0.hook_resid_pre", f"{layers}.0", "in"),
        Probe("language.blocks.1.hook_mlp_out", f"{layers}.1.mlp"),
    )
    draw = _fixed(case, 2, "tiny_vlm.qwen2_vl().inputs")
    return Subject("qwen2-vl", engine, model, plain, probes, draw, lambda o: o.logits, "vlm", generates=True)


def _blip_2(engine: str) -> Subject:
    def build() -> Any:
        import tiny_vlm

        return tiny_vlm.blip_2()

    model, case, plain = wrapped(engine, build)
    probes = (
        Probe("language.blocks.1.hook_resid_post", "language_model.model.decoder.layers.1"),
        Probe("vision.blocks.0.hook_resid_post", "vision_model.encoder.layers.0", needs="images"),
        Probe("vision.blocks.1.hook_mlp_out", "vision_model.encoder.layers.1.mlp", needs="images"),
    )
    draw = _fixed(case, 2, "tiny_vlm.blip_2().inputs")
    return Subject("blip-2", engine, model, plain, probes, draw, lambda o: o.logits, "vlm", generates=True)


def _dinov2(engine: str) -> Subject:
    def build() -> Any:
        import tiny_vision

        return tiny_vision.dinov2()

    model, case, plain = wrapped(engine, build)
    probes = (
        Probe("vision.blocks.1.hook_resid_post", "encoder.layer.1"),
        Probe("vision.blocks.0.hook_resid_pre", "encoder.layer.0", "in"),
    )
    draw = _fixed(case, 2, "tiny_vision.dinov2().inputs")
    return Subject("dinov2", engine, model, plain, probes, draw, lambda o: o.last_hidden_state, "tower")


def _siglip(engine: str) -> Subject:
    def build() -> Any:
        import tiny

        return tiny.siglip()

    model, case, plain = wrapped(engine, build)
    probes = (
        Probe("vision.blocks.1.hook_resid_post", "vision_model.encoder.layers.1"),
        Probe("text.blocks.0.hook_mlp_out", "text_model.encoder.layers.0.mlp"),
        Probe("text.blocks.1.attn.hook_q", "text_model.encoder.layers.1.self_attn.q_proj", heads=3),
    )
    draw = _fixed(case, 2, "tiny.siglip().inputs")
    return Subject("siglip", engine, model, plain, probes, draw, lambda o: o.logits_per_image, "contrastive")


BUILDERS: dict[str, Callable[[str], Subject]] = {
    "tiny-clip": _clip, "tiny-llava": _llava, "tiny-sd": tiny_sd, "flux": flux, "sd3": sd3, "heun": heun,
    "qwen2-vl": _qwen2_vl, "blip-2": _blip_2, "dinov2": _dinov2, "siglip": _siglip,
}  # fmt: skip
ENGINES = ("hooked", "nnsight")


_BUILT: dict[tuple[str, str], Subject] = {}


def subject(name: str, engine: str) -> Subject:
    """The subject of this name, built when it is first asked for."""
    if (name, engine) not in _BUILT:
        _BUILT[name, engine] = BUILDERS[name](engine)
    return _BUILT[name, engine]


def forget(one: Subject) -> None:
    """Has a subject built anew when it is next asked for: its model was left changed."""
    for key in [key for key, built in _BUILT.items() if built is one]:
        del _BUILT[key]
