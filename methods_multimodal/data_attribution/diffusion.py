"""Tasks of diffusion pipelines: the denoiser's loss or output at chosen timesteps, with common noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from methods_multimodal.core.generators import mixed
from methods_multimodal.data_attribution._parameters import select
from methods_multimodal.data_attribution.task import Batch, Call, Task
from methods_multimodal.diffusion.sampling import sampling_of
from mm_adapters import InputError, MissingSiteError, Model

Measure = Callable[[Tensor, Tensor], Tensor]
_OWN = ("index", "latents", "timestep")

# Each is of the prediction and its target, both [row, feature].
MEASURES: dict[str, Measure] = {
    "loss": lambda out, target: (out - target).square().mean(1),
    "output_norm": lambda out, _: out.square().mean(1),
    "output_l2": lambda out, _: out.norm(dim=1),
    "output_l1": lambda out, _: out.abs().mean(1),
    "output_max": lambda out, _: out.abs().amax(1),
    "output_mean": lambda out, _: out.mean(1),
}


def diffusion_task(
    model: Model,
    *,
    measure: str | Sequence[str] | Mapping[str, Measure] = "loss",
    timesteps: int | Sequence[int] | None = 10,
    n_noises: int = 1,
    n_own: int = 1,
    seed: int = 0,
    noise: Literal["each", "one"] = "each",
    parameters: str | Sequence[str] = "all",
    scheduler: Any = None,
    timestep_scale: float = 1.0,
) -> Task:
    """A task of a pipeline's denoiser; `denoiser_task` is the same of a denoiser alone.

    An example has "latents" [channel, height, width] (pixels in [-1, 1] if the pipeline has no
    autoencoder), and whatever else the denoiser takes ("encoder_hidden_states", "class_labels", ...;
    "added_cond_kwargs.text_embeds" for what lies in a dict), as `diffusion_examples` makes them.
    The noise is that of (seed, index, timestep, which noise), the same for training and query examples.
    Averages are over timesteps and noises.

    Args:
        measure: One or more names of `MEASURES`, or functions of (prediction, target), both [row, feature].
        timesteps: A number of evenly spaced ones, a list, or None: each example brings its own, as
            "timestep".
        n_noises: Draws of noise at each timestep.
        n_own: With `timesteps=None`, how many timesteps an example brings along a trajectory (Journey-TRAK:
            with what the sampler predicted as the clean picture at each): "timestep" is then [n_own] and
            "latents" [n_own, channel, height, width].
        seed: Of the noise.
        noise: "each" example has its own; "one" for all of them, without the index (as in D-TRAK).
        parameters: "all", "cross_attention_kv", "lora", or names or globs.
        scheduler: How noise is added; None: the pipeline's own.
        timestep_scale: Times a timestep is what the denoiser is given.

    Raises: MissingSiteError as `denoiser_of` does; InputError for an unknown measure or timestep.
    """
    module = denoiser_of(model)
    _, sampling = sampling_of(model, "denoiser")
    return denoiser_task(
        module,
        scheduler or getattr(model.wrapped, sampling.scheduler, None),
        measure=measure,
        timesteps=timesteps,
        n_noises=n_noises,
        n_own=n_own,
        seed=seed,
        noise=noise,
        parameters=parameters,
        timestep_scale=timestep_scale,
    )


def denoiser_task(
    module: nn.Module,
    scheduler: Any,
    *,
    measure: str | Sequence[str] | Mapping[str, Measure] = "loss",
    timesteps: int | Sequence[int] | None = 10,
    n_noises: int = 1,
    n_own: int = 1,
    seed: int = 0,
    noise: Literal["each", "one"] = "each",
    parameters: str | Sequence[str] = "all",
    timestep_scale: float = 1.0,
) -> Task:
    """A task of a denoiser alone, with a scheduler that says how noise is added.

    Args:
        module: Called as (noisy latents, timestep=, return_dict=False, what else an example has).
        scheduler: One of diffusers'.
        measure, timesteps, n_noises, n_own, seed, noise, parameters, timestep_scale: As `diffusion_task`
            takes them.

    Raises: InputError for an unknown measure or timestep, or no scheduler.
    """
    if scheduler is None:
        raise InputError("A lone denoiser does not say how noise is added. Pass scheduler=.")
    schedule = Schedule.of(scheduler, timestep_scale)
    measures = _measures(measure)
    if timesteps is None:
        steps = None
    elif isinstance(timesteps, int):
        if not 1 <= timesteps <= schedule.n_steps:
            raise InputError(f"{timesteps} timesteps cannot be spread over {schedule.n_steps}.")
        steps = [int((i + 0.5) * schedule.n_steps / timesteps) for i in range(timesteps)]
    else:
        steps = [int(t) for t in timesteps]
        if not steps or not all(0 <= t < schedule.n_steps for t in steps):
            raise InputError(f"Timesteps are 0 to {schedule.n_steps - 1}, not {steps}.")
    if n_noises < 1 or n_own < 1:
        raise InputError(f"There is at least one noise and timestep, not {n_noises} and {n_own}.")
    draws = Draws(schedule, None if steps is None else tuple(steps), n_noises, seed, noise == "one")

    def values(call: Call, rows: Batch) -> dict[str, Tensor]:
        out = call(rows["noisy"], timestep=rows["timestep"], return_dict=False, **_kwargs(rows))[0]
        # A denoiser that also learns its variance says it in further channels.
        out = out[:, : rows["target"].shape[1]].flatten(1).float()
        target = rows["target"].flatten(1).float()
        return {name: fn(out, target) for name, fn in measures.items()}

    about = {
        "module": type(module).__name__,
        "measures": list(measures),
        "timesteps": steps,
        "n_noises": n_noises,
        "n_own": n_own,
        "seed": seed,
        "noise": noise,
        "prediction": schedule.predicts,
    }
    n_draws = n_noises * (n_own if steps is None else len(steps))
    return Task(module, select(module, parameters), tuple(measures), n_draws, draws.rows, values, about)


def denoiser_of(model: Model) -> nn.Module:
    """The denoiser of a pipeline.

    Raises: MissingSiteError if the model has none, or one whose latents are no map.
    """
    module = model.check_tower("denoiser").module
    if model.loops() and sampling_of(model, "denoiser")[1].packed:
        raise MissingSiteError(
            f"{model.name}: its denoiser takes latents that are packed into positions, and an example's are "
            "a map, so there is no task of it here."
        )
    return module


@dataclass(frozen=True, eq=False)
class Schedule:
    """How a scheduler mixes signal and noise at each timestep, and what its denoiser predicts.

    `signal` and `noise` [timestep] are their shares; `times` is what the denoiser is given.
    """

    signal: Float[Tensor, " timestep"]
    noise: Float[Tensor, " timestep"]
    times: Tensor
    predicts: str

    @property
    def n_steps(self) -> int:
        return len(self.signal)

    @classmethod
    def of(cls, scheduler: Any, scale: float = 1.0) -> Schedule:
        """Raises: InputError for a scheduler that neither diffuses nor flows."""
        config = scheduler.config
        kept = getattr(scheduler, "alphas_cumprod", None)
        if kept is not None:
            kept = kept.double().cpu()
            times = torch.arange(len(kept)) if scale == 1.0 else torch.arange(len(kept)) * scale
            predicts = config.get("prediction_type", "epsilon")
            return cls(kept.sqrt().float(), (1 - kept).clamp_min(0).sqrt().float(), times, predicts)
        if "shift" not in config:
            raise InputError(f"{type(scheduler).__name__} has no alphas_cumprod and no flow to train by.")
        n, shift = config["num_train_timesteps"], config["shift"]
        plain = (torch.arange(n, dtype=torch.float64) + 1) / n
        sigma = (shift * plain / (1 + (shift - 1) * plain)).float()
        return cls(1 - sigma, sigma, sigma * n * scale, "flow")

    def target(self, clean: Tensor, noise: Tensor, signal: Tensor, share: Tensor) -> Tensor:
        """What the denoiser should predict."""
        if self.predicts == "epsilon":
            return noise
        if self.predicts == "v_prediction":
            return signal * noise - share * clean
        if self.predicts == "sample":
            return clean
        if self.predicts == "flow":
            return noise - clean
        raise InputError(f"A denoiser that predicts {self.predicts!r} has no known target.")


@dataclass(frozen=True, eq=False)
class Draws:
    """Lays examples out as noised rows, [example * draw, ...]."""

    schedule: Schedule
    steps: tuple[int, ...] | None
    n_noises: int
    seed: int
    shared: bool

    def rows(self, batch: Batch, which: range) -> dict[str, Tensor]:
        clean, steps = self._clean(batch, which)
        n, k = steps.shape
        noise = self.noise(batch["index"], steps, which, clean.shape[2:]).to(clean)
        shape = (n, k, *[1] * (clean.ndim - 2))
        signal, share = (
            s[steps].reshape(shape).to(clean) for s in (self.schedule.signal, self.schedule.noise)
        )
        noised = {
            "noisy": signal * clean + share * noise,
            "target": self.schedule.target(clean, noise, signal, share),
            "timestep": self.schedule.times[steps].to(clean.device),
        }
        rows = {name: rearrange(value, "n k ... -> (n k) ...") for name, value in noised.items()}
        others = {name: value for name, value in batch.items() if name not in _OWN}
        return rows | {name: repeat(value, "n ... -> (n k) ...", k=k) for name, value in others.items()}

    def noise(
        self,
        index: Int[Tensor, " example"],
        steps: Int[Tensor, "example draw"],
        which: range,
        shape: Sequence[int],
    ) -> Float[Tensor, "example draw ..."]:
        """Each example's noise in each draw, by its number and timestep alone."""
        known: dict[tuple[int, ...], Tensor] = {}
        noises: list[Tensor] = []
        for number, timesteps in zip(index.tolist(), steps.tolist(), strict=True):
            for step, draw in zip(timesteps, which, strict=True):
                # One more, so that -1, all examples' number, is none of theirs.
                key = tuple(
                    n + 1
                    for n in (self.seed, -1 if self.shared else int(number), int(step), draw % self.n_noises)
                )
                if key not in known:
                    known[key] = torch.randn(*shape, generator=mixed(*key))
                noises.append(known[key])
        return torch.stack(noises).unflatten(0, tuple(steps.shape))

    def _clean(self, batch: Batch, which: range) -> tuple[Tensor, Tensor]:
        """Latents [example, draw, ...] and timesteps [example, draw]."""
        latents = batch["latents"]
        at = torch.tensor([d // self.n_noises for d in which])
        if self.steps is not None:
            steps = torch.tensor(self.steps)[at].expand(len(latents), len(which))
            return repeat(latents, "n ... -> n k ...", k=len(which)), steps
        if "timestep" not in batch:
            raise InputError('With timesteps=None every example brings its own, as "timestep".')
        timesteps = batch["timestep"].cpu()
        if timesteps.ndim == 1:
            timesteps = timesteps[:, None]
            latents = latents[:, None]
        if int(at.max()) >= timesteps.shape[1] or timesteps.shape != latents.shape[:2]:
            raise InputError(
                f"Examples bring timesteps {list(timesteps.shape)} and latents {list(latents.shape)}; "
                "n_own is how many each has, of both."
            )
        return latents[:, at.to(latents.device)], timesteps[:, at]


def _measures(measure: str | Sequence[str] | Mapping[str, Measure]) -> dict[str, Measure]:
    if isinstance(measure, Mapping):
        measures = dict(measure)
    else:
        names = [measure] if isinstance(measure, str) else list(measure)
        unknown = [n for n in names if n not in MEASURES]
        if unknown:
            raise InputError(f"There is no measure {unknown[0]!r}; there is {', '.join(MEASURES)}.")
        measures = {name: MEASURES[name] for name in names}
    if not measures:
        raise InputError(f"No measure was asked for; there is {', '.join(MEASURES)}.")
    return measures


def _kwargs(rows: Batch) -> dict[str, Any]:
    """The denoiser's other arguments; "a.b" goes into the dict "a"."""
    out: dict[str, Any] = {}
    for name, value in rows.items():
        if name in ("noisy", "target", "timestep"):
            continue
        outer, _, inner = name.partition(".")
        if inner:
            out.setdefault(outer, {})[inner] = value
        else:
            out[name] = value
    return out


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward has an argument of this name."""
    return name in inspect.signature(module.forward).parameters
