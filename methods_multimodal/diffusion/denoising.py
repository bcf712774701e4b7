"""What a sampling loop predicts, step by step, and what picture it expects in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.diffusion._guidance import combine
from methods_multimodal.diffusion._samplers import clean_latents, input_scale, takes_variance
from methods_multimodal.diffusion.pictures import decode, to_array
from methods_multimodal.diffusion.sampling import sampling_of
from mm_adapters import InputError, Model, Read, Run
from mm_adapters.records import Guidance, Sampling

_SIZES = ("height", "width", "max_sequence_length")


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


@dataclass(frozen=True)
class StepPredictions(Record):
    """What the denoiser predicted at some steps (counted from 0), as the sampler counts it: noise, velocity
    or the clean latents.

    `parts` are those of guidance: "cond", and where the run is guided "uncond" (and "image"). `guided` is
    what the sampler was given of them, with the variances after it where that sampler takes them.
    `latents` are what each step began with, `times` the sampler's and `timesteps` their numbers among all
    that the sampler has.
    """

    guided: Float[Tensor, "step row ..."]
    parts: dict[str, Float[Tensor, "step row ..."]]
    latents: Float[Tensor, "step row ..."]
    steps: tuple[int, ...]
    times: tuple[float, ...]
    timesteps: tuple[int, ...]


class StepReader:
    """What to read in a run for its predictions and pictures, so that one run serves several methods.

    `n_frames` steps are kept, evenly spaced, without the first, which has noise alone to go by. `tower` is
    the loop that is read; `sampling` says by which sites and arguments (`step_reader` takes it from the
    model's record, Stable Diffusion's are the default).
    """

    def __init__(
        self, n_steps: int, n_frames: int = 6, *, tower: str = "denoiser", sampling: Sampling | None = None
    ) -> None:
        last = max(n_steps - 1, 1)
        spaced = torch.linspace(1, last, min(n_frames, last)).round().int().tolist()
        self.steps = tuple(dict.fromkeys(int(i) for i in spaced)) if n_steps > 1 else ()
        self.n_steps = n_steps
        self.tower = tower
        self.sampling = sampling or Sampling()
        self._inputs: Mapping[str, Any] = {}

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The pipeline's inputs with the number of steps in them."""
        self._inputs = {**inputs, self.sampling.steps: self.n_steps}
        return dict(self._inputs)

    def reads(self) -> list[Read]:
        """The latents at every step, and the predictions at those that are kept."""
        if not self.steps:
            return []
        latents, prediction = (
            f"{self.tower}.{part}" for part in (self.sampling.latents, self.sampling.prediction)
        )
        # Of a sampler of second order, the first call of each step: it begins at the step's own time.
        return [Read(latents), Read(prediction, steps=self.steps, calls=[0])]

    def step_predictions(self, model: Model, run: Run) -> StepPredictions:
        """Each kept step's parts of guidance, and what the sampler was given of them.

        Raises: InputError if the denoiser was called more often than the sampler has timesteps, or the
        loop has no step to keep.
        """
        tower, sampling = sampling_of(model, self.tower)
        if not self.steps:
            raise InputError(
                "A run of one step has no prediction to keep: its first has noise alone to go by."
            )
        latents_in = run[f"{tower}.{sampling.latents}"]
        predicted = run[f"{tower}.{sampling.prediction}"]
        rows = run.rows.get(tower, {"cond": slice(None)})
        sampler = getattr(model.wrapped, sampling.scheduler)
        calls = run.calls[f"{tower}.{sampling.latents}"]
        first = _first_timestep(sampler, len(calls), model.name)
        at = {call.step: i for i, call in enumerate(calls) if call.order == 0}
        turns = [at[step] for step in self.steps]
        axis = predicted.ndim - 1 if sampling.packed else 2  # With steps and rows before it.
        n_channels = _n_channels(sampling, predicted.shape[axis], latents_in.shape[axis])
        parts = {name: predicted[:, where] for name, where in rows.items()}
        means = {name: part.narrow(axis, 0, n_channels) for name, part in parts.items()}
        guidance = model.loops()[tower] or Guidance()
        guided = torch.stack(
            [
                combine(guidance, {k: v[i] for k, v in means.items()}, run.guidance)
                for i in range(len(predicted))
            ]
        )
        if takes_variance(sampler) and predicted.shape[axis] > n_channels:
            n_more = predicted.shape[axis] - n_channels
            guided = torch.cat([guided, parts["cond"].narrow(axis, n_channels, n_more)], axis)
        latents = latents_in[turns, rows["cond"]].narrow(axis, 0, n_channels)
        times = [sampler.timesteps[first + turn] for turn in turns]
        scales = torch.tensor([input_scale(sampler, time) for time in times]).to(latents)
        return StepPredictions(
            guided=guided,
            parts=means,
            latents=latents / scales.reshape(-1, *[1] * (latents.ndim - 1)),
            steps=self.steps,
            times=tuple(float(time) for time in times),
            timesteps=tuple(first + turn for turn in turns),
        )

    def predictions(self, model: Model, run: Run) -> tuple[list[Tensor], list[float]]:
        """What the sampler took for the clean latents at each step, [row, ...], and the steps' times.

        Raises: InputError for a sampler that does not say.
        """
        record = self.step_predictions(model, run)
        latents = self._clean(model, record)
        if latents is None:
            sampler = getattr(model.wrapped, self.sampling.scheduler)
            raise InputError(
                f"{type(sampler).__name__} does not say what it takes for the clean picture; "
                "DDIM, DDPM, Euler and samplers of flows do."
            )
        return latents, list(record.times)

    def pictures(self, model: Model, run: Run) -> DenoisingSteps:
        """The pictures, from a run with these reads and inputs. Decodes one a step.

        Raises: MissingSiteError if the loop makes no pictures.
        """
        shows, decoded = "latent", torch.zeros(0, 3, 1, 1)
        if self.steps:
            record = self.step_predictions(model, run)
            clean = self._clean(model, record)
            shows = "latent" if clean is None else "prediction"
            latents = list(record.latents) if clean is None else clean
            grid = self._grid(model)
            decoded = torch.cat([decode(model, x, grid=grid, tower=self.tower) for x in latents])
        return DenoisingSteps(pictures=decoded, steps=self.steps, n_steps=self.n_steps, shows=shows)

    def _clean(self, model: Model, record: StepPredictions) -> list[Tensor] | None:
        _, sampling = sampling_of(model, self.tower)
        sampler = getattr(model.wrapped, sampling.scheduler)
        latents: list[Tensor] = []
        for i, timestep in enumerate(record.timesteps):
            clean = clean_latents(sampler, record.guided[i], timestep, record.latents[i])
            if clean is None:
                return None
            latents.append(clean)
        return latents

    def _grid(self, model: Model) -> tuple[int, int] | None:
        """The rows and columns of positions, where they hold packed latents."""
        if not sampling_of(model, self.tower)[1].packed:
            return None
        sizes = {k: v for k, v in self._inputs.items() if k in _SIZES}
        return model.layout(text=["a"], **sizes)[self.tower].grid


def step_reader(model: Model, n_steps: int, n_frames: int = 6, tower: str | None = None) -> StepReader:
    """What to read of a model's sampling loop, the record's own by default, in a run of `n_steps`.

    Raises: InputError if the model has no such loop, or its record does not say what that denoises.
    """
    tower, sampling = sampling_of(model, tower)
    return StepReader(n_steps, n_frames, tower=tower, sampling=sampling)


def frames_of(record: DenoisingSteps) -> Sequence[Any]:
    """Each frame as an array of bytes."""
    return [to_array(p) for p in record.pictures]


def _n_channels(sampling: Sampling, n_predicted: int, n_given: int) -> int:
    """How many channels the latents have: of a prediction those before its variances."""
    halved = sampling.variance == "always" or (sampling.variance == "wide" and n_predicted == 2 * n_given)
    return n_predicted // 2 if halved else n_predicted


def _first_timestep(sampler: Any, n_calls: int, name: str) -> int:
    """The timestep of the loop's first call: a run that starts from a picture leaves the first ones out."""
    n_times = len(sampler.timesteps)
    if n_calls > n_times:
        raise InputError(
            f"{name} called its denoiser at {n_calls} steps, and its sampler has {n_times}: some of them "
            "are no steps of the sampler, as those of guidance by left-out layers."
        )
    return n_times - n_calls
