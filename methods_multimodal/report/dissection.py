"""The page, the JSON and the table that `mm-interp dissect` writes."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from methods_multimodal.core.files import write_json, write_text
from methods_multimodal.dissection.describe import exemplar
from methods_multimodal.dissection.scores import agreement
from methods_multimodal.dissection.survey import Named, Survey
from methods_multimodal.plots.dissection import activation_histogram, detectors
from methods_multimodal.report._html import inline, render
from methods_multimodal.report._page import rounded
from mm_adapters.inputs.images import to_rgb

_THUMB = 96


def write_page(
    survey: Survey,
    out: Path,
    *,
    model: str,
    pictures: Sequence[Any],
    maps: dict[int, list[tuple[int, Float[Tensor, "row column"]]]],
    thresholds: Float[Tensor, " unit"] | None,
    shown: Any = None,
) -> tuple[Path, Path, Path]:
    """Writes OUT/index.html (self-contained), OUT/units.json and OUT/units.csv; returns their paths.

    `pictures` are whatever `to_rgb` takes, such as paths. In the CSV, a name that begins as a formula does
    has an apostrophe before it.
    `maps[unit]` are (picture number, map) for the pictures on the unit's card; units without are in the
    tables only. `shown [image, concept]` says which pictures show what, if that is known.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [_row(survey, unit) for unit in range(survey.activations.shape[1])]
    table = out / "units.csv"
    lines = io.StringIO()
    writer = csv.DictWriter(lines, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    write_text(table, lines.getvalue())
    numbers = out / "units.json"
    about = {
        "model": model,
        "site": survey.site,
        "images": len(survey.activations),
        "concepts": survey.concepts.names,
        "twins": len(survey.twins),
        "methods": [_method(survey, one) for one in survey.methods],
    }
    write_json(numbers, {**about, "units": rows})
    page = out / "index.html"
    write_text(page, _page(survey, model, pictures, maps, thresholds, shown))
    return page, numbers, table


def _row(survey: Survey, unit: int) -> dict[str, Any]:
    row: dict[str, Any] = {"unit": unit}
    for one in survey.methods:
        row[f"{one.method}"] = one.names[unit]
        row[f"{one.method}_score"] = rounded(one.scores[unit], 6)
        row[f"{one.method}_q"] = rounded(one.chance.q[unit], 6)
        row[f"{one.method}_correlation"] = rounded(one.follows[unit], 4)
        if one.faithful is not None:
            row[f"{one.method}_auroc"] = rounded(one.faithful.auroc[unit], 4)
        if survey.twins:
            row[f"{one.method}_above_random"] = bool(
                float(one.scores[unit].double()) > survey.random_threshold(one.method)
            )
    row["top_pictures"] = " ".join(map(str, survey.top[unit].tolist()))
    return row


def _cell(value: Any) -> Any:
    """A name that a spreadsheet would calculate stands behind an apostrophe, which makes it a text."""
    is_formula = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if is_formula else value


def _page(
    survey: Survey,
    model: str,
    pictures: Sequence[Any],
    maps: dict[int, list[tuple[int, Tensor]]],
    thresholds: Tensor | None,
    shown: Any,
) -> str:
    first = survey.methods[0]
    kept = first.chance.significant()
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    detectors(
        first.names,
        kept,
        survey.concepts,
        figure.subplots(),
        title=f"what units detect ({first.method}; {len(kept)} of {len(first.names)} better than chance)",
    )
    return render(
        "dissection.html",
        title=f"{survey.site} of {model}",
        n_units=survey.activations.shape[1],
        n_images=len(survey.activations),
        n_concepts=len(survey.concepts),
        detectors=_plot(figure),
        methods=[_method(survey, one) for one in survey.methods],
        n_twins=len(survey.twins),
        agreements=_agreements(survey),
        units=[_card(survey, unit, pictures, maps[unit], thresholds, shown) for unit in maps],
    )


def _method(survey: Survey, one: Named) -> dict[str, Any]:
    """A line of the table of methods: each number, and what it is with random weights (None without)."""
    faithful = one.faithful
    twins = [twin.by_name(one.method) for twin in survey.twins]
    return {
        "name": one.method,
        "n_significant": len(one.chance.significant()),
        "n_significant_random": _mean([float(len(twin.chance.significant())) for twin in twins]),
        "n_above_random": len(survey.above_random(one.method)) if twins else None,
        "threshold": survey.random_threshold(one.method) if twins else None,
        "correlation": float(one.follows.mean()),
        "auroc": _auroc(one),
        "auroc_random": _mean([value for twin in twins if (value := _auroc(twin)) is not None]),
        "constant": None if faithful is None else float(faithful.constant.mean()),
        "constant_name": None if faithful is None else faithful.constant_name,
    }


def _auroc(one: Named) -> float | None:
    return None if one.faithful is None else float(one.faithful.auroc.mean())


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _agreements(survey: Survey) -> list[tuple[str, str, float]]:
    """For every two methods, the share of units that they give the same name."""
    table = agreement({one.method: one.names for one in survey.methods})
    pairs = itertools.combinations(enumerate(one.method for one in survey.methods), 2)
    return [(one, other, float(table[i, j])) for (i, one), (j, other) in pairs]


def _card(
    survey: Survey,
    unit: int,
    pictures: Sequence[Any],
    maps: list[tuple[int, Tensor]],
    thresholds: Tensor | None,
    shown: Any,
) -> dict[str, Any]:
    cut = float(thresholds[unit]) if thresholds is not None else None
    images = []
    for number, map_ in maps:
        level = cut if cut is not None and bool((map_ > cut).any()) else float(map_.flatten().quantile(0.9))
        small = to_rgb(pictures[number]).resize((_THUMB, _THUMB), Image.Resampling.NEAREST)
        images.append({"number": number, "source": _picture(exemplar(small, map_, level))})
    first = survey.methods[0]
    concept = survey.concepts.index(first.names[unit])
    figure = Figure(figsize=(2.9, 1.9), layout="constrained")
    values = survey.activations[:, unit]
    activation_histogram(
        values,
        figure.subplots(),
        shown=None if shown is None else shown[: len(values), concept],
        name=first.names[unit],
    )
    lines = [
        {
            "method": one.method,
            "name": one.names[unit],
            "score": float(one.scores[unit]),
            "q": float(one.chance.q[unit]),
            "auroc": None if one.faithful is None else float(one.faithful.auroc[unit]),
            "above": bool(survey.twins) and unit in survey.above_random(one.method),
        }
        for one in survey.methods
    ]
    return {
        "number": unit,
        "name": first.names[unit],
        "histogram": _plot(figure),
        "pictures": images,
        "lines": lines,
    }


def _plot(figure: Figure) -> str:
    return inline(lambda out: figure.savefig(out, format="png", dpi=90))


def _picture(image: Image.Image) -> str:
    return inline(lambda out: image.save(out, "PNG", optimize=True))


def strongest(survey: Survey, n: int) -> list[int]:
    """The units worth a card: the surest of each name first, then the next of each."""
    first = survey.methods[0]
    order = torch.argsort(first.scores, descending=True).tolist()
    surest = sorted(order, key=lambda unit: float(first.chance.q[unit]) > 0.05)
    by_name: dict[str, list[int]] = {}
    for unit in surest:
        by_name.setdefault(first.names[unit], []).append(unit)
    chosen: list[int] = []
    depth = 0
    while len(chosen) < min(n, len(order)):
        chosen += [units[depth] for units in by_name.values() if depth < len(units)]
        depth += 1
    return chosen[:n]
