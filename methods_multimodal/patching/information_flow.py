"""At which layers the answer takes what from where: image to question, question to last, image to last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import paired_interval
from methods_multimodal.patching.attention_knockout import Cut, Metric, knock_out
from methods_multimodal.patching.roles import TokenRoles, no_image, token_roles
from mm_adapters import InputError, Model

Flow = tuple[str, str]
# From whom to whom: Geva et al.'s, with the image for the subject.
FLOWS: tuple[Flow, ...] = (("image", "question"), ("question", "last"), ("image", "last"))
# The same where a tower reads by cross-attention.
READ_FLOWS: tuple[Flow, ...] = (("read", "question"), ("question", "last"), ("read", "last"))


@dataclass(frozen=True)
class InformationFlow(Record):
    """The metric of each row when one flow is blocked in one window of layers.

    `windows` are the layers of each; `base` is the metric with nothing blocked, `mass` the attention that
    each flow had in the window.
    """

    values: Float[Tensor, "flow window row"]
    base: Float[Tensor, " row"]
    mass: Float[Tensor, "flow window row"]
    flows: tuple[Flow, ...]
    windows: tuple[tuple[int, ...], ...]
    tower: str

    @property
    def effect(self) -> Float[Tensor, "flow window row"]:
        """How far each block moves the metric."""
        return self.values - self.base

    def interval(self, level: float = 0.95) -> Float[Tensor, "bound flow window"]:
        """The lower and upper bound of the mean effect, rows drawn again."""
        effect = self.effect.double().cpu().numpy()
        return torch.from_numpy(np.asarray(paired_interval(np.mean, effect, level=level))).float()


def information_flow(
    model: Model,
    inputs: Mapping[str, Any],
    metric: Metric,
    *,
    roles: TokenRoles | None = None,
    flows: Sequence[Flow] | None = None,
    window: int = 1,
    tower: str = "language",
    folder: str | Path | None = None,
) -> InformationFlow:
    """Blocks each flow in each window of layers, and measures what the answer loses.

    A flow from "read" is all that a tower's cross-attention reads: BLIP's text tower, and mllama, read their
    images so, the answer decoder of BLIP for questions what the text tower made of both.

    Args:
        model: What is run.
        inputs: Raw or prepared.
        metric: Maps the model's output to one number for each row.
        roles: The positions by role (None: `token_roles` of these inputs).
        flows: Pairs of roles: whose keys are blocked, for whose queries (None: `FLOWS`, or `READ_FLOWS` if no
            position of the tower is of an image and it has cross-attention).
        window: How many layers in a row are blocked together; as many as there are blocks the flow for good.
        tower: Whose attention.
        folder: Where runs are written down as they are done.

    Source: Geva et al. 2023, arXiv 2304.14767, section 5; for VLMs Neo et al. 2024, arXiv 2410.07149.
    Raises: MissingSiteError if the tower has no scores, or no image; InputError for a window of no layers, an
        unknown role or a flow without positions, before anything runs.
    """
    n_layers = model.check_tower(tower).n_layers()
    if not 1 <= window <= max(1, n_layers):
        raise InputError(f"window={window}: a window holds 1 to {n_layers} layers of the {tower} tower.")
    given = token_roles(model, inputs, tower=tower) if roles is None else roles
    crossed = _layers_that_read(model, tower)
    if flows is None:
        flows = FLOWS if "image" in given.masks or not crossed else READ_FLOWS
    if "image" not in given.masks and any("image" in flow for flow in flows):
        raise no_image(tower)
    windows = [tuple(range(i, i + window)) for i in range(max(1, n_layers - window + 1))]
    cuts = []
    for source, target in flows:
        for layers in windows:
            name = f"{source} to {target}"
            if source == "read":
                here = tuple(i for i in layers if i in crossed)
                cuts.append(Cut(name, given[target], None, here, attention="cross_attn"))
            else:
                cuts.append(Cut(name, given[target], given[source], layers))
    live = [cut for cut in cuts if cut.layers != ()]
    record = knock_out(model, inputs, metric, live, tower=tower, folder=folder)
    # A window without such an attention blocks nothing: its value is the base.
    values, mass, runs = [], [], iter(range(len(live)))
    for cut in cuts:
        number = None if cut.layers == () else next(runs)
        values.append(record.base if number is None else record.values[number])
        mass.append(torch.zeros_like(record.base) if number is None else record.mass[number])
    shape = (len(flows), len(windows), -1)
    return InformationFlow(
        values=torch.stack(values).reshape(shape),
        base=record.base,
        mass=torch.stack(mass).reshape(shape),
        flows=tuple((source, target) for source, target in flows),
        windows=tuple(windows),
        tower=tower,
    )


def _layers_that_read(model: Model, tower: str) -> set[int]:
    """The layers with a cross-attention."""
    sites = model.sites(f"{tower}.blocks.*.cross_attn.hook_attn_scores")
    return {int(site.name.split(".")[2]) for site in sites if site.reason is None}
