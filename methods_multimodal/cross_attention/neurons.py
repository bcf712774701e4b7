"""Neurons that hold one memorised picture: value neurons that a prompt drives out of distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.record import Record
from methods_multimodal.cross_attention._between import first_step_alone
from methods_multimodal.cross_attention._rows import RowEdit, edits, picture_for_each
from methods_multimodal.cross_attention._sites import prompt_layouts, text_attention
from methods_multimodal.cross_attention._ssim import similarity
from methods_multimodal.diffusion import sampling_of
from mm_adapters import InputError, Model, Read

Neuron = tuple[int, int]


@dataclass(frozen=True)
class NeuronStatistics(Record):
    """The mean and spread of each value neuron's activation over prompts: by layer, [neuron]."""

    mean: dict[str, Float[Tensor, " _"]]
    std: dict[str, Float[Tensor, " _"]]
    n_prompts: int


@dataclass(frozen=True)
class Memorisation(Record):
    """The neurons, as (layer, neuron), and the score before and after they are set to zero.

    The score is how alike the first steps of different seeds are, 0..1; `threshold` is what ordinary
    prompts have. `candidates` were out of distribution, `neurons` are those of them that it takes.
    """

    neurons: tuple[Neuron, ...]
    candidates: tuple[Neuron, ...]
    before: float
    after: float
    threshold: float


def neuron_statistics(
    model: Model, prompts: Sequence[str], *, options: Mapping[str, Any] | None = None
) -> NeuronStatistics:
    """Over prompts that nothing is known of: what is ordinary.

    Raises: InputError for fewer than two prompts.
    """
    if len(prompts) < 2:
        raise InputError(f"A spread takes at least two prompts; there are {len(prompts)}.")
    rows: dict[str, list[Tensor]] = {}
    for i in tqdm(range(0, len(prompts), 32), desc="statistics", unit="batch", disable=None, leave=False):
        for layer, values in activations(model, prompts[i : i + 32], options=options).items():
            rows.setdefault(layer, []).append(values)
    joined = {layer: torch.cat(parts) for layer, parts in rows.items()}
    return NeuronStatistics(
        mean={layer: x.mean(0) for layer, x in joined.items()},
        std={layer: x.std(0) for layer, x in joined.items()},
        n_prompts=len(prompts),
    )


def activations(
    model: Model, prompts: Sequence[str], *, options: Mapping[str, Any] | None = None
) -> dict[str, Float[Tensor, "prompt neuron"]]:
    """Each value neuron's activation by layer, at the first step: the mean over tokens of its size.

    The neurons are the outputs of the value projections to the text, in the down and middle blocks
    of a UNet (in all blocks of what is no UNet), over the prompt's tokens without its padding.
    """
    attention = _layers(model)
    layouts = prompt_layouts(model, prompts, options)
    live = torch.tensor([[role not in ("pad", "latent") for role in x.roles[0]] for x in layouts])

    def size(value: Float[Tensor, "prompt token head d"]) -> Float[Tensor, "prompt neuron"]:
        flat = rearrange(value.float().abs(), "p t h d -> p t (h d)")
        weight = live.to(flat)[:, : flat.shape[1], None]
        return (flat * weight).sum(1) / weight.sum(1)

    reads = [Read(a.site("v"), reduce=size, steps=[0], rows="cond") for a in attention]
    inputs = {**picture_for_each(options or {}, len(prompts)), **first_step_alone(model)}
    run = model.run({**inputs, "prompt": list(prompts), "seed": [0] * len(prompts)}, read=reads)
    return {str(a.layer): run[a.site("v")][0] for a in attention}


def first_noise(
    model: Model,
    prompt: str,
    neurons: Sequence[Neuron] = (),
    *,
    seeds: Sequence[int] = tuple(range(10)),
    options: Mapping[str, Any] | None = None,
) -> Float[Tensor, "seed channel height width"]:
    """What the first step takes away from each seed's noise, each channel from 0 to 1."""
    attention = {a.layer: a for a in _layers(model)}
    model.check_tower("text")
    row_edits = []
    for layer in sorted({layer for layer, _ in neurons}):
        if layer not in attention:
            raise InputError(f"Layer {layer} has no neurons here; those that do: {list(attention)}.")
        of_layer = [n for at, n in neurons if at == layer]
        for row in range(len(seeds)):
            row_edits.append(RowEdit(attention[layer].site("v"), row, _zeroed(of_layer)))
    inputs = {**picture_for_each(options or {}, len(seeds)), **first_step_alone(model)}
    inputs |= {"prompt": [prompt] * len(seeds), "seed": list(seeds)}
    tower, sampling = sampling_of(model)
    sites = [f"{tower}.{part}" for part in (sampling.prediction, sampling.latents)]
    run = model.run(inputs, read=[Read(s, steps=[0], rows="cond") for s in sites], edit=edits(row_edits))
    predicted, latents = (run[site][0].float() for site in sites)
    if sampling.packed:
        down, _ = prompt_layouts(model, [prompt], options)[0].grid or (1, 1)
        predicted, latents = (rearrange(x, "s (h w) c -> s c h w", h=down) for x in (predicted, latents))
    # Variances come after the prediction, pictures that guide after the latents.
    n_channels = min(predicted.shape[1], latents.shape[1])
    taken = predicted[:, :n_channels] - latents[:, :n_channels]
    low, high = taken.amin((-1, -2), keepdim=True), taken.amax((-1, -2), keepdim=True)
    return (taken - low) / (high - low).clamp(min=1e-12)


def memorisation_score(
    model: Model,
    prompt: str,
    neurons: Sequence[Neuron] = (),
    *,
    seeds: Sequence[int] = tuple(range(10)),
    options: Mapping[str, Any] | None = None,
) -> float:
    """How alike the first steps of different seeds are: the mean structural similarity of all pairs.

    A prompt whose picture is memorised takes all seeds the same way from the first step on.

    Source: Hintersdorf et al. 2024, arXiv 2406.02366, section 3.1.
    """
    if len(seeds) < 2:
        raise InputError("A score compares seeds: give at least two.")
    noise = first_noise(model, prompt, neurons, seeds=seeds, options=options)
    a, b = torch.triu_indices(len(seeds), len(seeds), 1)
    return float(similarity(noise[a], noise[b]).mean())


def find_neurons(
    model: Model,
    prompt: str,
    statistics: NeuronStatistics,
    *,
    threshold: float,
    seeds: Sequence[int] = tuple(range(10)),
    thetas: Sequence[float] = tuple(5 - i / 4 for i in range(17)),
    options: Mapping[str, Any] | None = None,
) -> Memorisation:
    """The fewest value neurons that, set to zero, make the seeds' first steps as different as usual.

    Neurons out of distribution by more than theta (and one more of the strongest of each layer at each
    theta) are set to zero, theta falling until no seed's first step is like the one without that;
    then layers, and then single neurons, are given back while that holds. `threshold` is what
    ordinary prompts have, the mean and a standard deviation (0.428 in Stable Diffusion 1.4).

    Source: Hintersdorf et al. 2024, arXiv 2406.02366, algorithms 1 to 3.
    Raises: InputError if the statistics are of another model.
    """
    run_options: dict[str, Any] = {"seeds": seeds, "options": options}
    of_prompt = activations(model, [prompt], options=options)
    if {k: len(v[0]) for k, v in of_prompt.items()} != {k: len(v) for k, v in statistics.mean.items()}:
        raise InputError("The statistics are of another model: their layers or neurons are not this one's.")
    odd = {
        layer: ((x[0] - statistics.mean[layer]) / statistics.std[layer].clamp(min=1e-12)).abs()
        for layer, x in of_prompt.items()
    }
    plain = first_noise(model, prompt, **run_options)

    def alike(neurons: Sequence[Neuron]) -> float:
        return float(similarity(plain, first_noise(model, prompt, neurons, **run_options)).max())

    candidates: list[Neuron] = []
    for k, theta in enumerate(thetas):
        candidates = _outside(odd, theta, k, of_prompt)
        if candidates and alike(candidates) <= threshold:
            break
    kept = list(candidates)
    for layer in sorted({layer for layer, _ in candidates}):  # Whole layers first: there are fewer.
        rest = [n for n in kept if n[0] != layer]
        if rest and alike(rest) <= threshold:
            kept = rest
    for neuron in list(kept):
        rest = [n for n in kept if n != neuron]
        if rest and alike(rest) <= threshold:
            kept = rest
    before, after = (memorisation_score(model, prompt, n, **run_options) for n in ((), tuple(kept)))
    return Memorisation(tuple(kept), tuple(candidates), before, after, threshold)


def _outside(odd: Mapping[str, Tensor], theta: float, k: int, values: Mapping[str, Tensor]) -> list[Neuron]:
    chosen: set[Neuron] = set()
    for layer, scores in odd.items():
        chosen |= {(int(layer), int(i)) for i in (scores > theta).nonzero().flatten().tolist()}
        chosen |= {(int(layer), int(i)) for i in values[layer][0].topk(min(k, len(scores))).indices.tolist()}
    return sorted(chosen)


def _layers(model: Model):
    return tuple(a for a in text_attention(model) if a.stage in ("down", "mid", ""))


def _zeroed(neurons: Sequence[int]):
    def zero(row: Float[Tensor, "token head d"], rows: Tensor) -> Tensor:
        flat = rearrange(row, "t h d -> t (h d)").clone()
        flat[:, list(neurons)] = 0
        return rearrange(flat, "t (h d) -> t h d", h=row.shape[1])

    return zero
