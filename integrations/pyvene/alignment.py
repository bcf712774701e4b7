"""Training an alignment (DAS) on any inputs, and how often its interchanges come true."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from integrations.pyvene.gates import layers_of
from integrations.pyvene.model import MMIntervenableModel, frozen
from mm_adapters import InputError


@dataclass(frozen=True)
class Alignment:
    """How training an alignment went: the loss of each step."""

    losses: tuple[float, ...]


def align(
    model: MMIntervenableModel,
    batches: Iterable[Mapping[str, Any]],
    loss: Callable[[Any, Mapping[str, Any]], Tensor],
    *,
    lr: float = 1e-2,
    temperature: tuple[float, float] | None = None,
    n_steps: int | None = None,
    boundary_weight: float = 0.0,
    progress: bool = True,
) -> Alignment:
    """Trains the interventions (DAS): pyvene's own loop knows token ids only, this one any inputs.

    The wrapped model's weights do not change.

    Args:
        batches: Each is {"base", "sources", "unit_locations", ...}, and "subspaces" if it has them.
        loss: `loss(output, batch)` of the counterfactual output.
        lr: Adam's learning rate.
        temperature: From and to, falling geometrically over the steps, for boundless subspaces.
        n_steps: Stops after so many batches; None: after all.
        boundary_weight: Times the size of the boundless subspaces, is added to the loss.

    Source: Geiger et al. 2023, arXiv 2303.02536; Wu et al. 2023, arXiv 2305.08809.
    Raises: InputError if nothing trains, for an option that these interventions do not use, and for fewer
    batches than `n_steps`.
    """
    parameters = [p for one in model.interventions.values() for p in one.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("None of these interventions has anything to train.")
    layers = [layer for one in model.interventions.values() for layer in layers_of(one)]
    boundaries = [one.intervention_boundaries for one in layers if hasattr(one, "intervention_boundaries")]
    n_batches = len(batches) if isinstance(batches, Sequence) else None
    total = n_batches if n_steps is None else n_steps
    if temperature is not None and not any(hasattr(one, "set_temperature") for one in layers):
        raise InputError("temperature=: none of these interventions has one; boundless subspaces do.")
    if temperature is not None and (total is None or min(temperature) <= 0):
        raise InputError("temperature= falls from one positive number to another over a known n_steps=.")
    if boundary_weight and not boundaries:
        raise InputError("boundary_weight=: none of these interventions has a boundary to train.")
    if n_steps is not None and (n_steps < 1 or (n_batches is not None and n_steps > n_batches)):
        raise InputError(f"n_steps={n_steps} of {n_batches} batches: give as many batches, such as [b] * n.")
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    with frozen(model.model), tqdm(batches, total=total, desc="DAS", disable=not progress) as bar:
        for step, batch in enumerate(bar):
            if temperature is not None and total is not None:
                start, stop = temperature
                model.set_temperature(torch.tensor(start * (stop / start) ** (step / max(total - 1, 1))))
            _, output = model(
                batch["base"], batch["sources"], batch["unit_locations"], subspaces=batch.get("subspaces")
            )
            value = loss(output, batch)
            for boundary in boundaries if boundary_weight else ():
                value = value + boundary_weight * boundary.sum()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
            bar.set_postfix(loss=f"{losses[-1]:.3g}")
            if n_steps is not None and step + 1 >= n_steps:
                break
    if n_steps is not None and len(losses) < n_steps:
        raise InputError(f"The batches ended after {len(losses)} of n_steps={n_steps}.")
    return Alignment(tuple(losses))


@torch.no_grad()
def interchange_accuracy(
    model: MMIntervenableModel,
    batches: Iterable[Mapping[str, Any]],
    right: Callable[[Any, Mapping[str, Any]], Tensor],
) -> float:
    """How often the counterfactual output is right, by `right(output, batch)` -> bool [row]."""
    is_right = [
        right(model(b["base"], b["sources"], b["unit_locations"], subspaces=b.get("subspaces"))[1], b).float()
        for b in batches
    ]
    return float(torch.cat(is_right).mean())
