"""What patching every head at every step would do, from one gradient through the sampling loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.kept import kept
from methods_multimodal.core.record import Record
from methods_multimodal.cross_attention._sites import TextAttention, text_attention, text_positions
from methods_multimodal.cross_attention.cases import Case, Part, align_positions, layouts_of
from methods_multimodal.cross_attention.metrics import Metric
from methods_multimodal.diffusion.pictures import pictures_of
from mm_adapters import InputError, Model


@dataclass(frozen=True)
class Attribution(Record):
    """The change of the metric that patching a head of a layer at a step would make, to first order.

    A layer with fewer heads than another has NaN in the rest.
    """

    effects: Float[Tensor, "case step layer head"]
    base: Float[Tensor, " case"]
    layers: tuple[int, ...]
    what: str

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
    options: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
) -> Attribution:
    """Estimates `patch_words` for every layer, head and step at once.

    (what the other prompt has there - what this one has) times the metric's gradient there, over a
    word's keys and values. Each case costs a run of the other prompt, and a run of its own with a
    gradient; `tests/benchmarks/cross_attention.py` says what that is in generations.

    With a `folder`, cases are written down as they are done, and a run that was killed goes on.

    Source: Nanda 2023, "Attribution patching"; Kramár et al. 2024, arXiv 2403.00745, section 2.
    Raises: InputError if the metric has no gradient, or a case has no other prompt.
    """
    attention = text_attention(model)
    layouts = layouts_of(model, cases, options)
    for case, (_, other) in zip(cases, layouts, strict=True):
        if other is None:
            raise InputError(f"Patching takes two prompts; the case {case.prompt!r} has no other one.")
    effects, base = [], []
    settings: dict[str, Any] = {"cases": list(cases), "metric": metric, "options": dict(options or {})}
    made_of = settings | {"job": "attribute_patching", "positions": positions}
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
                effect, value = _one(model, attention, case, to, source, metric, options)
                return {"effect": effect, "value": value}

            found = work.tensors(f"case {number}", of_case)
            effects.append(found["effect"])
            base.append(found["value"])
            bar.update()
    return Attribution(
        effects=torch.stack(effects),
        base=torch.stack(base),
        layers=tuple(a.layer for a in attention),
        what=f"keys and values, positions {positions!r}",
    )


def _one(
    model: Model,
    attention: Sequence[TextAttention],
    case: Case,
    to: Sequence[int],
    source: Sequence[int],
    metric: Metric,
    options: Mapping[str, Any] | None,
) -> tuple[Float[Tensor, "step layer head"], Float[Tensor, ""]]:
    names = [a.site(kind) for a in attention for kind in ("k", "v")]
    inputs = {**(options or {}), "seed": case.seed, "output_type": "pt"}
    donor = model.run({**inputs, "prompt": case.other}, read=names)
    measured: list[Tensor] = []

    def scalar(output: Any) -> Tensor:
        value = metric(pictures_of(model, output))
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise InputError(
                f"The metric {getattr(metric, '__name__', metric)!r} gave a value without a gradient, so it "
                "has no attribution. Use one made of torch operations, as clip_score; a rule on pixels "
                "has none: patch_words takes that."
            )
        measured.append(value.detach().float().sum())
        return value.sum()

    run = model.run({**inputs, "prompt": case.prompt}, read=names, grad_of=scalar)
    layers: list[Tensor] = []
    # Padding that the pipeline cut off, because it is no prompt's of the batch, is not there.
    n_pos = min(run.values[names[0]].shape[2], donor.values[names[0]].shape[2])
    pairs = [(t, s) for t, s in zip(to, source, strict=True) if max(t, s) < n_pos]
    to, source = [t for t, _ in pairs], [s for _, s in pairs]
    for layer in attention:
        total: Tensor | None = None
        for kind in ("k", "v"):
            site = layer.site(kind)
            donated = _conditional(donor.values[site], donor.rows, site)[:, :, list(source)].float()
            base = _conditional(run.values[site], run.rows, site)[:, :, list(to)].float()
            grad = _conditional(run.grads[site], run.rows, site)[:, :, list(to)].float()
            part = reduce((donated - base) * grad, "step row pos head d -> step head", "sum")
            total = part if total is None else total + part
        assert total is not None
        layers.append(total)
    most = max(x.shape[1] for x in layers)
    wide = [torch.nn.functional.pad(x, (0, most - x.shape[1]), value=float("nan")) for x in layers]
    return torch.stack(wide, 1).cpu(), measured[0].cpu()


def _conditional(value: Tensor, rows: Mapping[str, Mapping[str, slice]], site: str) -> Tensor:
    """The rows under the prompt, [step, row, ...]."""
    return value[:, rows[site.partition(".")[0]]["cond"]]
