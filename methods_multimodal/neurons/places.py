"""Where a tower's MLP neurons are, and how much each writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mm_adapters import InputError, Model, TowerView

Neuron = tuple[int, int]


def mlp_sites(model: Model, tower: str, layers: Sequence[int] | None = None) -> dict[int, str]:
    """The site of each layer's neurons, after the nonlinearity (and times the other half, where gated)."""
    n_layers = max(1, model.check_tower(tower).n_layers())
    chosen = range(n_layers) if layers is None else [int(i) for i in layers]
    return {i: f"{tower}.blocks.{i}.mlp.hook_post" for i in chosen}


def positions_mask(roles: Mapping[str, Bool[Tensor, "row pos"]]) -> Bool[Tensor, "row pos"]:
    """All positions of the roles. Raises: InputError if there are none, or some have two roles."""
    if not roles:
        raise InputError("There is no role. Give masks [row, pos] by name, as `token_roles` makes them.")
    count = torch.stack([mask.cpu().int() for mask in roles.values()]).sum(0)
    if int(count.max()) > 1:
        raise InputError(f"The roles {', '.join(roles)} overlap, so what they add would count twice.")
    if not bool(count.any(1).all()):
        raise InputError(f"A row has no position of the roles {', '.join(roles)}.")
    return count.bool()


def output_weights(view: TowerView, layer: int) -> Float[Tensor, "neuron d_model"]:
    """What each neuron of a layer writes for an activation of one."""
    return view.weights(layer).names("mlp")["W_out"]().detach().float()


def check_neurons(model: Model, tower: str, neurons: Sequence[Neuron]) -> tuple[Neuron, ...]:
    """The neurons as (layer, neuron) of plain numbers.

    Raises: InputError if there is none, or one that the tower does not have; MissingSiteError for its layer.
    """
    if not neurons:
        raise InputError("There are no neurons. Give pairs (layer, neuron).")
    view = model.check_tower(tower)
    plain = tuple((int(layer), int(neuron)) for layer, neuron in neurons)
    for layer in sorted({layer for layer, _ in plain}):
        model.check_site(f"{tower}.blocks.{layer}.mlp.hook_post")
        width = output_weights(view, layer).shape[0]
        wrong = [neuron for at, neuron in plain if at == layer and not 0 <= neuron < width]
        if wrong:
            raise InputError(f"Layer {layer} of {tower} has the neurons 0 to {width - 1}, not {wrong[0]}.")
    if len(set(plain)) < len(plain):
        raise InputError("A neuron is named twice.")
    return plain
