"""What a model loses without some neurons, beside as many others of the same layers that write as much."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.generators import mixed
from methods_multimodal.core.model import check_sites, prepared_once
from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.neurons.places import Neuron, check_neurons, mlp_sites, output_weights
from mm_adapters import Edit, InputError, Model, Read

Metric = Callable[[Any], Tensor]
Change = Callable[[Tensor], Tensor]
# Of how many neurons nearest in norm a control is drawn.
_NEAREST = 8


@dataclass(frozen=True)
class NeuronAblation(Record):
    """The metric without some neurons, and with each draw of two controls in their place.

    `controls` ablates as many other neurons of the same layers, drawn among those nearest in norm: a neuron's
    norm is the root mean square of its activation at the ablated positions times the length of its output
    weights, and `norm` and `control_norm` are those of all together. The strongest neurons of a layer have no
    match there, so `turned` moves the layers' other neurons in a random direction that writes exactly as
    much, at each position.
    """

    base: Float[Tensor, " row"]
    ablated: Float[Tensor, " row"]
    controls: Float[Tensor, "control row"]
    neurons: tuple[Neuron, ...]
    control_neurons: tuple[tuple[Neuron, ...], ...]
    norm: float
    control_norm: Float[Tensor, " control"]
    turned: Float[Tensor, "control row"]
    tower: str

    def effect(self, *, rng: int = 0) -> Estimate:
        """How far ablating the neurons moves the metric, with its interval over rows."""
        return bootstrap((self.ablated - self.base)[:, None], rng=rng)

    def control_effect(self, kind: str = "neurons", *, rng: int = 0) -> Estimate:
        """The same of a control, "neurons" or "turned", with its draws drawn again too."""
        return bootstrap((self._of(kind) - self.base).T, rng=rng)

    def above_control(self, kind: str = "neurons", *, rng: int = 0) -> Estimate:
        """How much further the neurons move it than that control, paired by rows."""
        return bootstrap(self.ablated[:, None] - self._of(kind).T, rng=rng)

    def _of(self, kind: str) -> Float[Tensor, "control row"]:
        if kind not in ("neurons", "turned") or not len(self.controls):
            raise InputError(
                f"There is no control {kind!r}: there is 'neurons' and 'turned', with n_controls above 0."
            )
        return self.controls if kind == "neurons" else self.turned


def ablate_neurons(
    model: Model,
    inputs: Mapping[str, Any],
    metric: Metric,
    neurons: Sequence[Neuron],
    *,
    where: Bool[Tensor, "row pos"] | None = None,
    to: str = "zero",
    n_controls: int = 5,
    seed: int = 0,
    tower: str = "language",
) -> NeuronAblation:
    """Sets neurons to zero (or to their mean), together, and then as many others in their place.

    Args:
        model: What is run.
        inputs: Raw or prepared.
        metric: Maps the model's output to one number for each row.
        neurons: As (layer, neuron).
        where: At which positions (None: all).
        to: "zero", or "mean": the neuron's mean over these positions.
        n_controls: How many draws of each control.
        seed: Of the draws.
        tower: Whose neurons.

    Source: Schwettmann et al. 2023, arXiv 2308.01544, section 4 (ablation); Dai et al. 2022, arXiv
        2104.08696.
    Raises: MissingSiteError for a layer without neurons; InputError for a neuron that there is not, too few
        others in a layer, or a mask that does not fit.
    """
    if to not in ("zero", "mean") or n_controls < 0:
        raise InputError(
            f"to={to!r}, n_controls={n_controls}: to 'zero' or 'mean', beside 0 or more controls."
        )
    plain = check_neurons(model, tower, neurons)
    sites = mlp_sites(model, tower, sorted({layer for layer, _ in plain}))
    check_sites(model, sites.values())
    view = model.check_tower(tower)
    lengths = {layer: output_weights(view, layer).norm(dim=1) for layer in sites}
    for layer, of in lengths.items():
        n = sum(at == layer for at, _ in plain)
        if n_controls and 2 * n > len(of):
            raise InputError(
                f"{n} of layer {layer}'s {len(of)} neurons are named, so there are no {n} others to "
                "compare with. Name fewer, or pass n_controls=0."
            )
    ready = prepared_once(model, inputs)
    run = model.run(ready, read=[Read(s, reduce=_moments(s, where)) for s in sites.values()])
    base = metric(run.output).detach().float()
    moments = {layer: run[site] for layer, site in sites.items()}
    norms = {layer: moments[layer][1].cpu() * lengths[layer].cpu() for layer in sites}
    draws = [_drawn(plain, norms, seed, i) for i in range(n_controls)]

    def of_layer(some: Sequence[Neuron], layer: int) -> list[int]:
        return [neuron for at, neuron in some if at == layer]

    runs: list[dict[int, Change]] = [
        {i: _set(moments[i][0], of_layer(some, i), where, to) for i in sites} for some in (plain, *draws)
    ]
    for number in range(n_controls):
        turned = {
            i: _turned(runs[0][i], output_weights(view, i), of_layer(plain, i), mixed(seed, number, i))
            for i in sites
        }
        runs.append(turned)
    values = []
    for changes in tqdm(runs, desc="ablating", unit="run", disable=None, leave=False):
        edits = [Edit(sites[i], change) for i, change in changes.items()]
        values.append(metric(model.run(ready, edit=edits).output).detach().float())
    none = base.new_zeros(0, len(base))
    return NeuronAblation(
        base=base,
        ablated=values[0],
        controls=torch.stack(values[1 : 1 + n_controls]) if draws else none,
        neurons=plain,
        control_neurons=tuple(draws),
        norm=_together(plain, norms),
        control_norm=torch.tensor([_together(draw, norms) for draw in draws]),
        turned=torch.stack(values[1 + n_controls :]) if draws else none,
        tower=tower,
    )


def _moments(site: str, where: Tensor | None) -> Callable[[Tensor], Tensor]:
    """[mean and root mean square, neuron] over the positions."""

    def fold(value: Tensor) -> Tensor:
        if where is not None and tuple(where.shape) != tuple(value.shape[:2]):
            raise InputError(
                f"{site} is {list(value.shape)}; the mask of its positions is {list(where.shape)}."
            )
        active = value.float().flatten(0, 1) if where is None else value.float()[where.to(value.device)]
        return torch.stack([active.mean(0), active.square().mean(0).sqrt()])

    return fold


def _set(mean: Tensor, neurons: list[int], where: Tensor | None, to: str) -> Change:
    def put(value: Tensor) -> Tensor:
        value = value.clone()
        new = mean[neurons].to(value) if to == "mean" else torch.zeros(len(neurons)).to(value)
        if where is None:
            value[..., neurons] = new
        else:
            at = where.to(value.device)[:, :, None]
            value[..., neurons] = torch.where(at, new, value[..., neurons])
        return value

    return put


def _turned(
    change: Change, weights: Float[Tensor, "neuron d_model"], neurons: list[int], rng: torch.Generator
) -> Change:
    """Moves all other neurons in a random direction, by as much of what is written as `change` moves."""
    direction = torch.randn(len(weights), generator=rng).to(weights)
    direction[neurons] = 0.0
    direction = direction / (direction @ weights).norm()

    def put(value: Tensor) -> Tensor:
        moved = (change(value) - value)[..., neurons].float() @ weights[neurons]
        return value + (moved.norm(dim=-1, keepdim=True) * direction).to(value)

    return put


def _drawn(
    neurons: Sequence[Neuron], norms: Mapping[int, Float[Tensor, " neuron"]], seed: int, number: int
) -> tuple[Neuron, ...]:
    """Another neuron for each, of its layer and among those nearest in norm; none twice."""
    rng = mixed(seed, number)
    taken = set(neurons)
    drawn = []
    for i in torch.randperm(len(neurons), generator=rng).tolist():
        layer, neuron = neurons[i]
        nearest = (norms[layer] - norms[layer][neuron]).abs().argsort().tolist()
        free = [other for other in nearest if (layer, other) not in taken][:_NEAREST]
        picked = (layer, free[int(torch.randint(len(free), (), generator=rng))])
        taken.add(picked)
        drawn.append(picked)
    return tuple(drawn)


def _together(neurons: Sequence[Neuron], norms: Mapping[int, Tensor]) -> float:
    return float(torch.stack([norms[layer][neuron] for layer, neuron in neurons]).square().sum().sqrt())
