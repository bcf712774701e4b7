"""What patching every head at every step would do, from gradients through the sampling loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.attribution import Ends, midpoints, path_gradients
from methods_multimodal.core.kept import kept
from methods_multimodal.core.record import Record
from methods_multimodal.cross_attention._sites import TextAttention, text_attention, text_positions
from methods_multimodal.cross_attention.cases import Case, Part, align_positions, layouts_of
from methods_multimodal.cross_attention.metrics import Metric
from methods_multimodal.diffusion.pictures import pictures_of
from mm_adapters import Edit, InputError, Model, Read

# A sum further off the whole effect than this share of it says which parts matter, not by how much.
TRUSTED = 0.3


@dataclass(frozen=True)
class Attribution(Record):
    """The change of the metric that patching a head of a layer at a step would make, estimated by gradients.

    A layer with fewer heads than another has NaN in the rest. `whole` is the metric with everything patched
    at once: what the effects should add up to, less `base`.
    """

    effects: Float[Tensor, "case step layer head"]
    base: Float[Tensor, " case"]
    whole: Float[Tensor, " case"]
    layers: tuple[int, ...]
    what: str
    points: int

    @property
    def completeness(self) -> float:
        """The sum of the estimates by the whole effect, over cases: 1 is right, and far from 1 is poor."""
        return float(self._sum(Part()).sum() / (self.whole - self.base).sum())

    @property
    def sizes_are_trusted(self) -> bool:
        """Whether the sum is within 30 % of the whole effect; if not, read the order of the parts alone."""
        return abs(self.completeness - 1) <= TRUSTED

    def of(self, parts: Sequence[Part]) -> Float[Tensor, "part case"]:
        """The estimate for each part: the sum over its layers, heads and steps."""
        return torch.stack([self._sum(part) for part in parts])

    def _sum(self, part: Part) -> Float[Tensor, " case"]:
        picked = self.effects.nan_to_num(0.0)
        if part.steps is not None:
            picked = picked[:, list(part.steps)]
        if part.layers is not None:
            picked = picked[:, :, [self.layers.index(layer) for layer in part.layers]]
        if part.heads is not None:
            picked = picked[..., list(part.heads)]
        return reduce(picked, "case step layer head -> case", "sum")


def attribute_patching(
    model: Model,
    cases: Sequence[Case],
    metric: Metric,
    *,
    positions: str = "after",
    method: Literal["integrated", "gradient"] = "integrated",
    points: int = 10,
    options: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
) -> Attribution:
    """Estimates `patch_words` for every layer, head and step at once.

    (what the other prompt has there - what this one has) times the metric's gradient there, over a word's
    keys and values. Each case costs three forwards, and a forward and a backward for each point.
    `effects_of_parts` patches instead where that costs no more.

    With a `folder`, cases are written down as they are done, and a run that was killed goes on.

    Args:
        model: What draws.
        cases: Prompts, each with another one.
        metric: Takes pictures, gives a number each, by torch operations.
        positions: Where a word is read, as in `patch_words`.
        method: "integrated": the mean gradient at midpoints of the straight path from this prompt's keys and
            values to the other's. "gradient": that of the picture as it is, which a readout that saturates
            makes many times too small.
        points: How many midpoints.
        options: The pipeline's.
        folder: Where cases are written down.

    Source: Nanda 2023, "Attribution patching"; Kramár et al. 2024, arXiv 2403.00745, section 2; Hanna et al.
        2024, arXiv 2403.17806 (the mean along a path).
    Raises: InputError if the metric has no gradient, or a case has no other prompt.
    """
    shares = midpoints(points) if method == "integrated" else ()
    attention = text_attention(model)
    layouts = layouts_of(model, cases, options)
    for case, (_, other) in zip(cases, layouts, strict=True):
        if other is None:
            raise InputError(f"Patching takes two prompts; the case {case.prompt!r} has no other one.")
    parts: list[dict[str, Tensor]] = []
    settings: dict[str, Any] = {"cases": list(cases), "metric": metric, "options": dict(options or {})}
    made_of = settings | {
        "job": "attribute_patching",
        "positions": positions,
        "shares": list(shares),
    }
    bar = tqdm(total=len(cases), desc="attribution", unit="case", disable=None, leave=False)
    with bar, kept(folder, models={"model": model}, **made_of) as work:
        for number, (case, (layout, other)) in enumerate(zip(cases, layouts, strict=True)):
            assert other is not None
            if case.word:
                to, source = align_positions(
                    layout, other, case.word, case.other_word or case.word, positions
                )
            else:
                to = source = text_positions(layout)

            def of_case(case: Case = case, to: Any = to, source: Any = source) -> dict[str, Tensor]:
                return _one(model, attention, case, to, source, metric, shares, options)

            parts.append(work.tensors(f"case {number}", of_case))
            bar.update()
    return Attribution(
        effects=torch.stack([part["effect"] for part in parts]),
        base=torch.stack([part["base"] for part in parts]),
        whole=torch.stack([part["whole"] for part in parts]),
        layers=tuple(a.layer for a in attention),
        what=f"keys and values, positions {positions!r}",
        points=len(shares),
    )


def _one(
    model: Model,
    attention: Sequence[TextAttention],
    case: Case,
    to: Sequence[int],
    source: Sequence[int],
    metric: Metric,
    shares: Sequence[float],
    options: Mapping[str, Any] | None,
) -> dict[str, Tensor]:
    names = [a.site(kind) for a in attention for kind in ("k", "v")]
    reads = [Read(name, rows="cond") for name in names]
    inputs = {**(options or {}), "seed": case.seed, "output_type": "pt", "prompt": case.prompt}
    donor = model.run({**inputs, "prompt": case.other}, read=reads)
    own = model.run(inputs, read=reads)
    path = {name: _path(own.values[name], donor.values[name], own.calls[name], to, source) for name in names}

    def of_pictures(output: Any) -> Tensor:
        return metric(pictures_of(model, output))

    along = path_gradients(model, inputs, names, path, of_pictures, shares=shares, rows="cond")
    every = [Edit(name, ends.at(1.0), rows="cond") for name, ends in path.items()]
    with torch.no_grad():
        base, whole = of_pictures(own.output), of_pictures(model.run(inputs, edit=every).output)
    layers: list[Tensor] = []
    for layer in attention:
        each = [path[layer.site(kind)] for kind in ("k", "v")]
        grads = [along.grads[layer.site(kind)] for kind in ("k", "v")]
        moved = [(ends.end.float() - ends.start.float()) * g for ends, g in zip(each, grads, strict=True)]
        layers.append(reduce(moved[0], "call row pos head d -> call head", "sum"))
        layers[-1] += reduce(moved[1], "call row pos head d -> call head", "sum")
    most = max(x.shape[1] for x in layers)
    wide = [torch.nn.functional.pad(x, (0, most - x.shape[1]), value=float("nan")) for x in layers]
    return {"effect": torch.stack(wide, 1).cpu(), "base": _total(base), "whole": _total(whole)}


def _path(own: Tensor, donor: Tensor, calls: Any, to: Sequence[int], source: Sequence[int]) -> Ends:
    """From a site's values to those with a word's positions taken from the other prompt's."""
    # Padding that the pipeline cut off, because it is no prompt's of the batch, is not there.
    n_pos = min(own.shape[2], donor.shape[2])
    pairs = [(t, s) for t, s in zip(to, source, strict=True) if max(t, s) < n_pos]
    at = [t for t, _ in pairs]
    end, only = own.clone(), torch.zeros(own.shape[1:3], dtype=torch.bool, device=own.device)
    end[:, :, at] = donor[:, :, [s for _, s in pairs]]
    only[:, at] = True
    return Ends(own, end, calls, only)


def _total(value: Tensor) -> Float[Tensor, ""]:
    return value.detach().float().sum().cpu()
