"""Journey-TRAK: which training examples led a pipeline from noise to its picture, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.data_attribution.diffusion import Schedule, denoiser_of, diffusion_task
from methods_multimodal.data_attribution.encoding import texts
from methods_multimodal.data_attribution.features import Checkpoint, query_features
from methods_multimodal.data_attribution.projection import Projection
from methods_multimodal.data_attribution.scorers import scores
from methods_multimodal.data_attribution.trak import Trak
from methods_multimodal.diffusion.denoising import step_reader
from methods_multimodal.diffusion.pictures import check_pictures, pictures_of
from mm_adapters import InputError, Model
from mm_adapters.store import Store


@dataclass(frozen=True)
class Trajectory(Record):
    """What a pipeline's sampling loop took for the clean picture at some of its steps.

    `latents` as the denoiser sees pictures; `steps` of the loop, counted from 0; `timestep` of each as a
    number of the training schedule; `pictures` in 0..1 are what was drawn in the end.
    """

    latents: Float[Tensor, "prompt step channel row column"]
    timestep: Int[Tensor, "prompt step"]
    pictures: Float[Tensor, "prompt 3 height width"]
    steps: tuple[int, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Journey(Record):
    """Scores of training examples at each step of a trajectory; positive is helpful.

    `timestep`, `pictures`, `steps` and `prompts` are the trajectory's.
    """

    by_step: Float[Tensor, "prompt step train"]
    timestep: Int[Tensor, "prompt step"]
    pictures: Float[Tensor, "prompt 3 height width"]
    steps: tuple[int, ...]
    prompts: tuple[str, ...]

    def scores(self) -> Float[Tensor, "prompt train"]:
        """Each drawing's: the mean over steps."""
        return self.by_step.mean(1)


def trajectory(
    model: Model, prompts: Sequence[str], *, n_own: int = 10, n_steps: int = 50, seed: int = 0, **inputs: Any
) -> Trajectory:
    """Draws each prompt with the pipeline's own loop and keeps what its sampler predicted on the way.

    `n_own` steps are kept, spaced evenly; the first is left out, since it has noise alone to go by.
    Prompt i is drawn from seed + i; `inputs` go to the pipeline (`guidance_scale`, ...).

    Raises: MissingSiteError if the model reads no prompt, makes no picture or its latents are no map, before
    anything is drawn; InputError for a sampler that does not say what it predicts, after the first drawing.
    """
    model.check_tower("text")
    denoiser_of(model)
    _, sampling = check_pictures(model, "denoiser")
    if not prompts or n_own < 1 or n_steps < 2:
        raise InputError(
            f"A trajectory needs a prompt, a step to keep and two steps in all, not {len(prompts)}, {n_own} "
            f"and {n_steps}."
        )
    times = Schedule.of(getattr(model.wrapped, sampling.scheduler)).times.double()
    latents, at, pictures, steps = [], [], [], ()
    for number, prompt in enumerate(prompts):
        reader = step_reader(model, n_steps, n_own, "denoiser")
        arguments = {**inputs, "prompt": prompt, "seed": seed + number, "output_type": "pt"}
        run = model.run(reader.inputs(arguments), read=reader.reads())
        clean, step_times = reader.predictions(model, run)
        latents.append(torch.cat([one.float().cpu() for one in clean]))
        at.append(torch.stack([(times - time).abs().argmin() for time in step_times]))
        pictures.append(pictures_of(model, run.output)[0].float().cpu())
        steps = reader.steps
    return Trajectory(torch.stack(latents), torch.stack(at), torch.stack(pictures), steps, tuple(prompts))


def journey_trak(
    model: Model,
    store: Store,
    prompts: Sequence[str] | Trajectory,
    *,
    scorer: Trak | None = None,
    parameters: str | Sequence[str] = "all",
    checkpoints: Sequence[Checkpoint] | None = None,
    n_noises: int = 1,
    seed: int = 0,
    inputs: Mapping[str, Any] | None = None,
) -> Journey:
    """Draws the prompts and scores the stored training examples for every step of each drawing.

        store = featurise(diffusion_task(model), examples, "gradients")
        best = journey_trak(model, store, ["a red circle"]).scores().topk(10)

    The query at a step is the denoiser's loss there on what the sampler took for the clean picture,
    noised anew by `n_noises` draws. `parameters` and `checkpoints` are those the store was made with,
    `inputs` what `trajectory` takes besides prompts; a `Trajectory` is used as it is. `scorer` is `Trak()`
    unless it is given.

    Source: Georgiev et al. 2023, arXiv 2312.06205, section 3.
    Raises: InputError as `trajectory` does; StoreError for a store made otherwise.
    """
    scorer = scorer or Trak()
    pipe = model.wrapped
    measure = scorer.query_measure or scorer.measure
    task = diffusion_task(
        model, measure=measure, timesteps=None, n_noises=n_noises, seed=seed, parameters=parameters
    )
    traced = (
        prompts
        if isinstance(prompts, Trajectory)
        else trajectory(model, prompts, seed=seed, **dict(inputs or {}))
    )
    n, k = traced.timestep.shape
    with torch.no_grad():
        encoded = texts(pipe, denoiser_of(model), list(traced.prompts), traced.pictures.shape[-2:])
    examples = {name: value.cpu().repeat_interleave(k, 0) for name, value in encoded.items()}
    examples |= {"latents": traced.latents.flatten(0, 1), "timestep": traced.timestep.flatten()}
    examples["index"] = torch.arange(n).repeat_interleave(k)
    features = query_features(
        task, examples, projection=Projection(**store.about["projection"]), checkpoints=checkpoints
    )
    by_step = scores(scorer, store, features).unflatten(0, (n, k))
    return Journey(by_step, traced.timestep, traced.pictures, traced.steps, traced.prompts)
