"""Options of pipelines and models: right ones, misspelt ones, and values that mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch

from tests.fuzz.call import Call, Expect, Kind
from tests.fuzz.subjects import Subject, generator, plain_run

NAN, INFINITE = float("nan"), float("inf")
_OF_PIPELINES: tuple[tuple[str, Any], ...] = (
    ("num_inferance_steps", 3), ("negativ_prompt", "blue"), ("guidance", 3.0), ("guidancescale", 2.0),
    ("foo", 1), ("images", "picture"), ("image", "picture"), ("texts", ["a"]), ("prompts", ["a"]),
    ("n_steps", 2), ("outputtype", "pt"), ("strength", 0.5), ("temperature", 0.5), ("seeds", 3),
    ("Prompt", "a"), ("num_inference_steps", 0), ("num_inference_steps", -3), ("num_inference_steps", 2.5),
    ("num_inference_steps", "two"), ("num_inference_steps", NAN), ("num_inference_steps", None),
    ("guidance_scale", NAN), ("guidance_scale", "high"), ("guidance_scale", INFINITE),
    ("guidance_scale", None), ("guidance_scale", [2.0]), ("guidance_scale", 2j),
    ("height", 63), ("height", 0), ("height", -8), ("height", "big"), ("height", 16.5), ("width", 1),
    ("width", 30), ("width", -64), ("num_images_per_prompt", 0), ("num_images_per_prompt", -1),
    ("num_images_per_prompt", 1.5), ("num_images_per_prompt", "two"),
    ("seed", 1.7), ("seed", "a"), ("seed", NAN), ("seed", [1.5]), ("seed", [1, 2, 3, 4, 5]),
    ("generator", 7), ("generator", "seed"), ("output_type", "foo"), ("output_type", 3),
    ("prompt", 5), ("prompt", None), ("prompt", []), ("prompt", [None]), ("prompt", ["a", 3]),
    ("prompt", b"red"), ("prompt", {"a": 1}),
    ("latents", torch.zeros(1, 1, 1, 1)), ("latents", "noise"), ("prompt_embeds", torch.zeros(1, 2, 3)),
    ("callback_on_step_end", 3),
)  # fmt: skip
_OF_STABLE_DIFFUSION: tuple[tuple[str, Any], ...] = (
    ("negative_prompt", ["a", "b", "c", "d"]), ("negative_prompt", 3), ("eta", "x"), ("eta", NAN),
    ("negative_prompt", [None]), ("guidance_rescale", "x"), ("cross_attention_kwargs", 3),
    ("timesteps", []),
)  # fmt: skip
_OF_MODELS: tuple[tuple[str, Any], ...] = (
    ("foo", 1), ("temperature", 0.5), ("max_new_tokens", 3), ("seed", 3), ("prompt", "a"),
    ("num_inference_steps", 2), ("input_id", [[1]]), ("inputs_ids", [[1]]), ("pixelvalues", 0),
    ("question", "what?"), ("texts", ["a"]), ("image", "picture"), ("labels_", 1), ("do_sample", True),
    ("outputs", 1), ("attentionmask", 1),
)  # fmt: skip


def _shown(value: Any) -> str:
    return f"torch.zeros{tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def good_option(rng: Random, subject: Subject) -> Call:
    """A pipeline called with its own options: what the library's own call gives."""
    given = subject.draw(rng)
    sd = subject.name == "tiny-sd"
    more: list[tuple[str, Any]] = [
        ("output_type", "latent"), ("output_type", "np"), ("num_inference_steps", 3),
        ("num_images_per_prompt", 2), ("seed", 0), ("guidance_scale", 2), ("guidance_scale", 0.0),
        ("seed", list(range(given.rows))), ("callback_on_step_end", _keep),
    ]  # fmt: skip
    if sd:
        more += [("negative_prompt", "a blue square"), ("eta", 0.0), ("guidance_rescale", 0.5),
                 ("height", 32), ("width", 32),
                 ("latents", latents(given.rows))]  # fmt: skip
    name, value = rng.choice(more)
    if name == "negative_prompt" and isinstance(given.ours["prompt"], list):
        value = [value] * given.rows
    options = given.ours | {name: value}
    if name == "latents":
        options = {k: v for k, v in options.items() if k not in ("height", "width")}
    sizes = {"height": 64, "width": 64} if {"height", "width"} & options.keys() and name != "latents" else {}
    as_generator = name != "seed" and rng.random() < 0.3
    site = subject.probes[0]
    way = rng.choice(["run", "call", "run_with_cache"] if subject.engine == "hooked" else ["run"])

    def perform() -> dict[str, Any]:
        ours = dict(options)
        if as_generator:
            ours["generator"] = generator(ours.pop("seed"))
        if way == "run":
            run = subject.model.run(ours, read=[site.site])
            return {"output": torch.as_tensor(run.output.images), "value": run[site.site]}
        if way == "call":
            return {"output": torch.as_tensor(subject.model(**ours).images)}
        output, cache = subject.model.run_with_cache(**ours, names_filter=site.site)
        return {"output": torch.as_tensor(output.images), "value": cache[site.site]}

    def right() -> dict[str, Any]:
        output, seen = plain_run(subject, sizes | options, [site])
        values = {"output": torch.as_tensor(output.images), "value": torch.stack(seen[site.site])}
        return values if way != "call" else {"output": values["output"]}

    options_text = ", ".join(f"{k}={_shown(v)}" for k, v in options.items())
    text = f"{way}({options_text}{' with generator=' if as_generator else ''})"
    return Call("good option", text, Expect.VALUE, subject, perform, right)


def latents(rows: int) -> torch.Tensor:
    return torch.randn(rows, 4, 16, 16, generator=torch.Generator().manual_seed(rows))


def _keep(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
    return values


def bad_option(rng: Random, subject: Subject) -> Call:
    """An option that nobody takes, or a value that means nothing."""
    given = subject.draw(rng)
    options = dict(given.ours)
    if subject.is_pipeline:
        known = _OF_PIPELINES + (_OF_STABLE_DIFFUSION if subject.name == "tiny-sd" else ())
        name, value = rng.choice(known)
        if subject.name != "tiny-sd" and name in ("height", "width") and value in (63, 30, 1):
            value = 7
    else:
        name, value = rng.choice(_OF_MODELS)
        if rng.random() < 0.3 and subject.raw:
            name, value = rng.choice([("input_ids", torch.ones(1, 3, dtype=torch.long)), ("text", 3)])
            if name == "input_ids" and "text" not in options:
                name, value = "foo", 1
    options[name] = value
    if subject.is_pipeline and rng.random() < 0.1:
        options, name, value = given.ours | {"generator": generator(1)}, "generator", "beside seed"
    if name == "prompt" and isinstance(value, str | type(None)) and not subject.is_pipeline:
        options = given.ours | {name: value}
    ways = _ways(subject, options)
    way = rng.choice(sorted(ways))

    def perform() -> dict[str, Any]:
        return {"answer": str(type(ways[way]()))}

    line = f"{way}({given.text} | {{{name!r}: {_shown(value)}}})"
    return Call("bad option", line, Expect.REFUSAL, subject, perform)


def _ways(subject: Subject, options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    model = subject.model
    site = subject.probes[0].site
    ways: dict[str, Callable[[], Any]] = {
        "run": lambda: model.run(options, read=[site]),
        "run, nothing read": lambda: model.run(options),
    }
    if subject.engine == "hooked":
        ways["run_with_cache"] = lambda: model.run_with_cache(**options, names_filter=site)
        ways["run_with_hooks"] = lambda: model.run_with_hooks(
            **options, fwd_hooks=[(site, lambda v, hook: None)]
        )
    else:
        ways["trace"] = lambda: _traced(model, options, site)
    return ways


def _traced(model: Any, options: dict[str, Any], site: str) -> Any:
    with model.trace(**options):
        value = model.site(site).save()
    return value


def bad_tensor(rng: Random, subject: Subject) -> Call:
    """A prepared tensor that the model cannot take as it is."""
    given = subject.draw(rng)
    ready: dict[str, Any] = {k: v for k, v in given.plain.items() if isinstance(v, torch.Tensor)}
    forms: list[tuple[str, str, Callable[[torch.Tensor], Any]]] = []
    if "pixel_values" in ready and ready["pixel_values"].ndim == 4:
        forms += [
            ("pixel_values", "[..., ::2, ::2]", lambda v: v[..., ::2, ::2]),
            ("pixel_values", "[:, :1]", lambda v: v[:, :1]),
            ("pixel_values", "[0]", lambda v: v[0]),
            ("pixel_values", ".int()", lambda v: v.int()),
            ("pixel_values", " * nan", lambda v: v * NAN),
            ("pixel_values", "[:0]", lambda v: v[:0]),
            ("pixel_values", ".tolist()", lambda v: v[..., :2].tolist()),
            ("pixel_values", ".permute(0, 2, 3, 1)", lambda v: v.permute(0, 2, 3, 1)),
            ("pixel_values", " * 1j", lambda v: v * 1j),
        ]
        if subject.name == "dinov2":  # It takes any size and reads them all.
            forms = [f for f in forms if "::2" not in f[1]]
    if "input_ids" in ready:
        forms += [
            ("input_ids", ".float()", lambda v: v.float()),
            ("input_ids", "[0]", lambda v: v[0]),
            ("input_ids", " + 10**6", lambda v: v + 10**6),
            ("input_ids", " * -1", lambda v: v * -1),
            ("input_ids", "[:, :0]", lambda v: v[:, :0]),
            ("input_ids", "[:0]", lambda v: v[:0]),
            ("input_ids", "[..., None]", lambda v: v[..., None]),
            ("input_ids", ".tolist()", lambda v: v.tolist()),
        ]
    if "attention_mask" in ready:
        forms += [
            ("attention_mask", "[:, :2]", lambda v: v[:, :2]),
            ("attention_mask", "[:, :0]", lambda v: v[:, :0]),
            ("attention_mask", " of 3 rows more", lambda v: v.repeat(4, 1)[: v.shape[0] + 3]),
            ("attention_mask", "[0]", lambda v: v[0]),
        ]
    name, shown, form = rng.choice(forms)
    options = ready | {name: form(ready[name])}
    ways = _ways(subject, options)
    way = rng.choice(sorted(ways))

    def perform() -> dict[str, Any]:
        return {"answer": str(type(ways[way]()))}

    line = f"{way}(prepared {given.text}, {name}{shown})"
    return Call("bad tensor", line, Expect.REFUSAL, subject, perform)


KINDS = (
    Kind(good_option, fits=lambda s: s.is_pipeline, weight=2),
    Kind(bad_option, weight=2.5),
    Kind(bad_tensor, fits=lambda s: not s.is_pipeline, weight=1),
)
