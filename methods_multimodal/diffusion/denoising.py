"""What a diffusion pipeline expects the finished picture to be, as it goes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.record import Record
from mm_adapters import HookedModel, InputError, Lens, Read, Run


@dataclass(frozen=True)
class DenoisingSteps(Record):
    """Pictures in 0..1 at some of `n_steps` steps (counted from 0).

    `shows` is "prediction" (the finished picture, as predicted at that step) or "latent" (what the
    step began with, decoded as it is), for samplers that do not say what they predict.
    """

    pictures: Float[Tensor, "frame 3 height width"]
    steps: tuple[int, ...]
    n_steps: int
    shows: str


class StepReader:
    """What to read in a run to get `DenoisingSteps` from it, so that one run serves several methods.

    It watches the pipeline through the pipeline's own callback: run with `inputs(...)`.
    """

    def __init__(self, n_steps: int, n_frames: int = 6) -> None:
        # A step's own latent is what the step before it left, so the first has none.
        last = max(n_steps - 1, 1)
        spaced = torch.linspace(1, last, min(n_frames, last)).round().int().tolist()
        self.steps = tuple(dict.fromkeys(int(i) for i in spaced)) if n_steps > 1 else ()
        self.n_steps = n_steps
        self._latents: dict[int, Tensor] = {}
        self._times: dict[int, Any] = {}

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The pipeline's inputs with the callback in them."""
        return {**inputs, "num_inference_steps": self.n_steps, "callback_on_step_end": self._note}

    def reads(self, denoiser: str = "denoiser") -> list[Read]:
        """The denoiser's output at the chosen steps."""
        return [Read(f"{denoiser}.hook_out", steps=self.steps)] if self.steps else []

    def pictures(self, model: HookedModel, run: Run, denoiser: str = "denoiser") -> DenoisingSteps:
        """The pictures, from a run with these reads and inputs. Decodes one a step."""
        latents, shows = self._before(), "latent"
        if self.steps:
            predicted = self._predictions(model.wrapped, run[f"{denoiser}.hook_out"])
            latents, shows = (latents, shows) if predicted is None else (predicted, "prediction")
        decoded = (
            torch.cat([decode(model, latent) for latent in latents]) if latents else torch.zeros(0, 3, 1, 1)
        )
        return DenoisingSteps(pictures=decoded, steps=self.steps, n_steps=self.n_steps, shows=shows)

    def predictions(
        self, model: Lens, run: Run, denoiser: str = "denoiser"
    ) -> tuple[list[Tensor], list[float]]:
        """What the sampler took for the clean latent at each step, [row, ...], and the steps' times.

        Raises: InputError for a sampler that does not say.
        """
        pipeline: Any = model.wrapped  # type: ignore[attr-defined]
        found = self._predictions(pipeline, run[f"{denoiser}.hook_out"])
        if found is None:
            raise InputError(
                f"{type(pipeline.scheduler).__name__} does not say what it takes for the clean picture; "
                "DDIM, DDPM and Euler do."
            )
        return found, [float(self._times[step]) for step in self.steps]

    def _note(self, pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._times[step] = time
        if step + 1 in self.steps:
            self._latents[step + 1] = tensors["latents"].detach().clone()
        return {}

    def _before(self) -> list[Tensor]:
        return [self._latents[step] for step in self.steps]

    def _predictions(self, pipeline: Any, outputs: Float[Tensor, "frame row _ _ _"]) -> list[Tensor] | None:
        """What the scheduler says the finished latent is; None if it does not say."""
        if getattr(pipeline, "guidance_rescale", 0.0):
            return None
        found: list[Tensor] = []
        for step, output in zip(self.steps, outputs, strict=True):
            if pipeline.do_classifier_free_guidance:
                free, guided = output.chunk(2)
                output = free + pipeline.guidance_scale * (guided - free)
            scheduler = copy.deepcopy(pipeline.scheduler)
            # Samplers count their steps; a fresh count finds its place by the time.
            scheduler.set_timesteps(self.n_steps, device=output.device)
            said = scheduler.step(output, self._times[step], self._latents[step])
            predicted = getattr(said, "pred_original_sample", None)
            if predicted is None:
                return None
            found.append(predicted)
        return found


@torch.no_grad()
def decode(model: HookedModel, latents: Float[Tensor, "row _ _ _"]) -> Float[Tensor, "row 3 height width"]:
    """Latents as pictures in 0..1, through the pipeline's own autoencoder."""
    pipeline = model.wrapped
    settings = pipeline.vae.config
    shift = getattr(settings, "shift_factor", None) or 0.0
    latents = latents.to(pipeline.vae.dtype) / settings.scaling_factor + shift
    pictures = pipeline.vae.decode(latents, return_dict=False)[0]
    return pipeline.image_processor.postprocess(pictures, output_type="pt").float().cpu()


def to_array(picture: Float[Tensor, "3 height width"]) -> Any:
    """A picture as matplotlib and Pillow take it: [height, width, 3] bytes."""
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def frames_of(record: DenoisingSteps) -> Sequence[Any]:
    """Each frame as an array of bytes."""
    return [to_array(p) for p in record.pictures]
