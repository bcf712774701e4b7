"""How much each MLP neuron adds to an answer: integrated gradients, or one gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.model import check_sites, prepared_once
from methods_multimodal.core.record import Record
from methods_multimodal.neurons.places import Neuron, mlp_sites, positions_mask
from mm_adapters import Edit, InputError, Model, Read

Metric = Callable[[Any], Tensor]


@dataclass(frozen=True)
class NeuronAttribution(Record):
    """Each neuron's share of each metric, summed over the positions of each role.

    With integrated gradients the shares of a layer sum to `whole`: the metric less what it is with the
    layer's neurons at zero at these positions. `targets` are the metrics: answers, or modalities of the
    output.
    """

    attribution: Float[Tensor, "target role row layer neuron"]
    whole: Float[Tensor, "target row layer"]
    targets: tuple[str, ...]
    roles: tuple[str, ...]
    layers: tuple[int, ...]
    tower: str
    method: str

    def top(self, n: int, *, target: int = 0, role: int | None = None) -> tuple[Neuron, ...]:
        """The neurons with the largest mean attribution, as (layer, neuron); of one role, or of their sum."""
        return self._largest(self._mean(target, role), n)

    def overlap(self, n: int) -> Float[Tensor, "target target"]:
        """How many of each two targets' top `n` neurons are the same, over those in either (Jaccard).

        Two sets drawn at random would share about n / (2 N) of N neurons.
        """
        tops = [set(self.top(n, target=i)) for i in range(len(self.targets))]
        return torch.tensor([[len(a & b) / len(a | b) for b in tops] for a in tops])

    def completeness(self) -> Float[Tensor, "target layer"]:
        """How far a layer's attributions are from summing to its whole, in means, over the largest whole."""
        summed = self.attribution.sum((1, 4)).mean(1)
        whole = self.whole.mean(1)
        return (summed - whole).abs() / whole.abs().amax(1, keepdim=True).clamp_min(1e-12)

    def _mean(self, target: int, role: int | None) -> Float[Tensor, "layer neuron"]:
        of_target = self.attribution[target].mean(1)
        return of_target.sum(0) if role is None else of_target[role]

    def _largest(self, scores: Float[Tensor, "layer neuron"], n: int) -> tuple[Neuron, ...]:
        order = scores.flatten().argsort(descending=True)[:n].tolist()
        return tuple((self.layers[i // scores.shape[1]], i % scores.shape[1]) for i in order)


def attribute_neurons(
    model: Model,
    inputs: Mapping[str, Any],
    metrics: Mapping[str, Metric],
    roles: Mapping[str, Bool[Tensor, "row pos"]],
    *,
    tower: str = "language",
    layers: Sequence[int] | None = None,
    method: str = "integrated",
    steps: int = 20,
) -> NeuronAttribution:
    """Attributes each metric to a tower's MLP neurons, by the roles of the positions where they are active.

    "integrated": one layer's neurons go from zero to what they are, at the roles' positions, and their
    gradients are averaged on the way at the middles of `steps` steps. It costs `layers * steps` forwards and
    backwards for each metric. "gradient": one gradient times the activation, for all layers at once.

    Args:
        model: What is run.
        inputs: Raw or prepared.
        metrics: By name: each maps the model's output to one number for each row, which autograd follows.
            Metrics of text and of image tokens split the neurons by output modality.
        roles: Masks [row, pos] by name that do not overlap: "last" alone for knowledge neurons, "image" for
            image neurons.
        tower: Whose neurons.
        layers: Which layers (None: all).
        method: "integrated" or "gradient".
        steps: Of the integral.

    Source: Dai et al. 2022, arXiv 2104.08696, equation 2 (integrated); Schwettmann et al. 2023, arXiv
        2308.01544 (gradient, of image positions); Fang et al. 2024, NeurIPS (NAM, by output modality).
    Raises: MissingSiteError for a layer without neurons; InputError for roles that overlap or do not fit, and
        settings that are none.
    """
    if method not in ("integrated", "gradient"):
        raise InputError(f"method={method!r}: there is 'integrated' and 'gradient'.")
    if steps < 1 or not metrics:
        raise InputError(f"steps={steps} and {len(metrics)} metrics: at least one of each is needed.")
    chosen = mlp_sites(model, tower, layers)
    check_sites(model, chosen.values())
    where = positions_mask(roles)
    ready = prepared_once(model, inputs)
    values = model.run(ready, read=list(chosen.values()))
    for site in chosen.values():
        if tuple(values[site].shape[:2]) != tuple(where.shape):
            raise InputError(
                f"{site} is {list(values[site].shape)}; the masks of the roles are {list(where.shape)}."
            )
    work = _Work(model, ready, chosen, {s: values[s].detach() for s in chosen.values()}, where)
    run = work.integrated if method == "integrated" else work.gradient
    n_runs = len(metrics) * (len(chosen) * steps if method == "integrated" else 1)
    with tqdm(total=n_runs, desc="neurons", unit="run", disable=None, leave=False) as bar:
        shares = [run(metric, steps, bar) for metric in metrics.values()]
    wholes = [work.whole(metric, values.output) for metric in metrics.values()]
    by_role = [
        torch.stack([torch.stack([(x * _wide(m, x)).sum(1) for x in of], 1) for m in roles.values()])
        for of in shares
    ]
    return NeuronAttribution(
        attribution=torch.stack(by_role),
        whole=torch.stack(wholes),
        targets=tuple(metrics),
        roles=tuple(roles),
        layers=tuple(chosen),
        tower=tower,
        method=method,
    )


@dataclass(frozen=True)
class _Work:
    """The runs of one attribution."""

    model: Model
    inputs: Mapping[str, Any]
    sites: Mapping[int, str]
    values: Mapping[str, Tensor]
    where: Tensor

    def integrated(self, metric: Metric, steps: int, bar: Any) -> list[Tensor]:
        """By layer [row, pos, neuron]: the activation times the mean gradient on the way to it from zero."""
        found = []
        for site in self.sites.values():
            total = torch.zeros_like(self.values[site], dtype=torch.float32)
            for k in range(steps):
                edit = Edit(site, self._scaled((k + 0.5) / steps))
                total += self._gradients(metric, [site], [edit])[site]
                bar.update()
            found.append(self.values[site].float() * total / steps * _wide(self.where, total))
        return found

    def gradient(self, metric: Metric, steps: int, bar: Any) -> list[Tensor]:
        """By layer [row, pos, neuron]: the activation times its gradient."""
        grads = self._gradients(metric, list(self.sites.values()), [])
        bar.update()
        return [self.values[s].float() * grads[s] * _wide(self.where, grads[s]) for s in self.sites.values()]

    def whole(self, metric: Metric, output: Any) -> Float[Tensor, "row layer"]:
        """The metric less what it is with each layer's neurons at zero."""
        base = metric(output).detach().float()
        zeroed = [
            self.model.run(self.inputs, edit=[Edit(s, self._scaled(0.0))]).output for s in self.sites.values()
        ]
        return torch.stack([base - metric(output).detach().float() for output in zeroed], 1)

    def _gradients(self, metric: Metric, sites: list[str], edits: list[Edit]) -> dict[str, Tensor]:
        run = self.model.run(
            self.inputs, read=[Read(s) for s in sites], edit=edits, grad_of=lambda o: metric(o).sum()
        )
        return {site: run.grads[site].float() for site in sites}

    def _scaled(self, share: float) -> Callable[[Tensor], Tensor]:
        def scale(value: Tensor) -> Tensor:
            return torch.where(_wide(self.where, value), value * share, value)

        return scale


def _wide(mask: Bool[Tensor, "row pos"], value: Tensor) -> Tensor:
    return mask.to(value.device)[:, :, None]
