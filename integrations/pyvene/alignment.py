"""Training an alignment (DAS) on any inputs, and how often its interchanges come true."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

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

    A batch is {"base", "sources", "unit_locations", ...}; `loss(output, batch)` is of the
    counterfactual output. The wrapped model's weights do not change. `temperature`: from and to,
    falling geometrically, for boundless subspaces, with `boundary_weight` times their size added.

    Source: Geiger et al. 2023, arXiv 2303.02536; Wu et al. 2023, arXiv 2305.08809.
    """
    parameters = [p for one in model.interventions.values() for p in one.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("None of these interventions has anything to train.")
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    listed: Iterable[Mapping[str, Any]] = batches
    total = n_steps or (len(batches) if isinstance(batches, Sequence) else None)
    with frozen(model.model), tqdm(listed, total=total, desc="DAS", disable=not progress) as bar:
        for step, batch in enumerate(bar):
            if temperature is not None and total:
                start, stop = temperature
                model.set_temperature(torch.tensor(start * (stop / start) ** (step / max(total - 1, 1))))
            _, output = model(
                batch["base"], batch["sources"], batch["unit_locations"], subspaces=batch.get("subspaces")
            )
            value = loss(output, batch)
            for one in model.interventions.values():
                bounds = getattr(one, "intervention_boundaries", None)
                if boundary_weight and bounds is not None:
                    value = value + boundary_weight * bounds.sum()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
            bar.set_postfix(loss=f"{losses[-1]:.3g}")
            if n_steps is not None and step + 1 >= n_steps:
                break
    return Alignment(tuple(losses))


@torch.no_grad()
def interchange_accuracy(
    model: MMIntervenableModel,
    batches: Iterable[Mapping[str, Any]],
    right: Callable[[Any, Mapping[str, Any]], Tensor],
) -> float:
    """How often the counterfactual output is right, by `right(output, batch)` -> bool [row]."""
    found = [
        right(model(b["base"], b["sources"], b["unit_locations"], subspaces=b.get("subspaces"))[1], b).float()
        for b in batches
    ]
    return float(torch.cat(found).mean())
