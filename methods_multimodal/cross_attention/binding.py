"""Binds attributes to their nouns: moves the latents until both words attend to the same pixels."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.cross_attention._between import check_between_steps, first_step_alone
from methods_multimodal.cross_attention._rows import generate
from methods_multimodal.cross_attention._sites import prompt_layouts, text_attention
from methods_multimodal.diffusion import sampling_of
from mm_adapters import InputError, MissingSiteError, Model, Read, wrap

MOST_PIXELS = 256


def binding_loss(maps: Float[Tensor, "word pixel"], pairs: Sequence[tuple[int, int]]) -> Float[Tensor, ""]:
    """How little the two words of each pair look at the same pixels, and how much at others' pixels.

    The largest divergence within a pair, minus the mean divergence between a pair and every word
    outside of it. A divergence is half the sum of both Kullback-Leibler ones.

    Source: Rassin et al. 2023, arXiv 2306.08877, equations 2 to 4 (SynGen).
    """
    logs = (maps / maps.sum(-1, keepdim=True)).clamp(min=1e-12).log()
    apart = (logs.exp()[:, None] * (logs[:, None] - logs[None])).sum(-1)
    apart = (apart + apart.T) / 2
    within = torch.stack([apart[a, b] for a, b in pairs]).max()
    between = []
    for a, b in pairs:
        outside = [w for w in range(len(maps)) if w not in (a, b)]
        if outside:
            between.append((apart[a, outside] + apart[b, outside]).mean() / 2)
    return within - torch.stack(between).mean() if between else within


def bind_attributes(
    model: Model,
    prompt: str,
    pairs: Sequence[tuple[str, str]],
    *,
    n_steps: int,
    seed: int = 0,
    rate: float = 20.0,
    until: float = 0.5,
    options: Mapping[str, Any] | None = None,
) -> Float[Tensor, "1 3 height width"]:
    """The picture of a prompt whose words are bound in pairs: [("red", "circle"), ("blue", "square")].

    Before each of the first steps (a share `until` of them) the latents go `rate` times the gradient
    of `binding_loss` downhill. The maps are those of the finest resolution with at most 16 x 16
    pixels. A rate of 0 gives the plain picture.

    Source: Rassin et al. 2023, arXiv 2306.08877 (20, and 25 of 50 steps, are theirs).
    Raises: MissingSiteError, WordNotFoundError, InputError before anything runs.
    """
    if not pairs or n_steps < 1 or not 0 <= until <= 1:
        raise InputError("Binding takes at least one pair of words, one step, and until in 0..1.")
    tower, _ = sampling_of(model)
    text_attention(model, tower)
    layout = prompt_layouts(model, [prompt], options)[0]
    if model.towers[tower].input_name != "sample":
        raise MissingSiteError(
            f"Binding moves the latents of a UNet, and {model.name} has no {tower}.resnets.0.hook_out."
        )
    check_between_steps(model, "Binding")
    for word in itertools.chain(*pairs):
        layout.where(word)
    words = list(dict.fromkeys([*(w.text for w in layout.words[0]), *itertools.chain(*pairs)]))
    positions = [layout.where(w) for w in words]
    index = [(words.index(a), words.index(b)) for a, b in pairs]
    options = {**(options or {}), "num_inference_steps": n_steps}
    steps = range(int(until * n_steps))
    if rate == 0 or not steps:
        return generate(model, [prompt], [seed], options=options)
    mover = _Mover(model, positions, index, rate, steps)
    with mover.recording():
        # Its first call says what the denoiser is called with, and what it begins with.
        run = model.run(
            {**options, "prompt": [prompt], "seed": [seed], **first_step_alone(model)},
            read=[Read(f"{mover.tower}.hook_in", steps=[0])],
        )
        scheduler = model.wrapped.scheduler
        first = run[f"{mover.tower}.hook_in"][0]
        mover.rows = (len(first), run.rows[mover.tower]["cond"])
        start = first[mover.rows[1]] / _scale(scheduler, scheduler.timesteps[0])
        moved = mover.moved(start, scheduler, scheduler.timesteps[0])
        latents = moved / getattr(scheduler, "init_noise_sigma", 1.0)
        options |= {"latents": latents, "callback_on_step_end": mover.after_step}
        return generate(model, [prompt], [seed], options=options)


class _Mover:
    """Moves latents downhill, between the steps of a run, by calls of the denoiser alone."""

    def __init__(
        self,
        model: Model,
        positions: Sequence[Sequence[int]],
        pairs: Sequence[tuple[int, int]],
        rate: float,
        steps: range,
    ) -> None:
        self.tower, _ = sampling_of(model)
        self.module = model.towers[self.tower].module
        self.denoiser = wrap(self.module)
        (self.denoiser_name,) = self.denoiser.towers
        self.attention = text_attention(self.denoiser, self.denoiser_name)
        self.positions = positions
        self.pairs = pairs
        self.rate = rate
        self.steps = steps
        self.arguments: dict[str, Any] = {}
        self.rows: tuple[int, slice] = (1, slice(None))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps the arguments of the denoiser's last call."""

        def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.arguments = {
                k: v for k, v in kwargs.items() if k not in ("sample", "timestep", "return_dict")
            }

        handle = self.module.register_forward_pre_hook(record, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def after_step(self, pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's callback: moves the latents that the next step begins with."""
        if step + 1 not in self.steps:
            return {}
        scheduler = pipeline.scheduler
        return {"latents": self.moved(tensors["latents"], scheduler, scheduler.timesteps[step + 1])}

    def moved(self, latents: Tensor, scheduler: Any, time: Any) -> Tensor:
        """The latents after one step downhill."""
        sample = (latents.detach() * _scale(scheduler, time)).requires_grad_()
        kept: dict[str, Tensor] = {}

        def keep(site: str):
            def fold(pattern: Tensor) -> Tensor:
                kept[site] = pattern
                return pattern

            return fold

        reads = [
            Read(site, reduce=keep(site), grad=False) for site in (a.site("pattern") for a in self.attention)
        ]
        inputs = {**_conditional(self.arguments, *self.rows), "sample": sample, "timestep": time}
        with torch.enable_grad():  # Pipelines switch it off around their callbacks.
            run = self.denoiser.run(
                inputs,
                read=[*reads, f"{self.denoiser_name}.hook_in"],
                grad_of=lambda output: binding_loss(self._maps(kept), self.pairs),
            )
        grad = run.grads[f"{self.denoiser_name}.hook_in"].reshape(latents.shape)
        return latents - self.rate * grad * _scale(scheduler, time)

    def _maps(self, kept: Mapping[str, Tensor]) -> Float[Tensor, "word pixel"]:
        layers = [kept[a.site("pattern")].mean((0, 1)) for a in self.attention]
        fine = [x for x in layers if len(x) <= MOST_PIXELS] or layers
        most = max(len(x) for x in fine)
        mean = torch.stack([x for x in fine if len(x) == most]).mean(0)
        return torch.stack([mean[:, list(p)].sum(-1) for p in self.positions])


def _scale(scheduler: Any, time: Any) -> float:
    """What the sampler multiplies its latents with before the denoiser sees them."""
    fresh = copy.deepcopy(scheduler)
    return float(fresh.scale_model_input(torch.ones(1), time))


def _conditional(arguments: Mapping[str, Any], n_rows: int, rows: slice) -> dict[str, Any]:
    """The call's arguments for the rows under the prompt."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == n_rows:
            return value[rows]
        return {k: cut(v) for k, v in value.items()} if isinstance(value, dict) else value

    return {k: cut(v) for k, v in arguments.items() if v is not None}
