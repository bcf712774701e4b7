"""The page, the JSON and the table that `mm-interp dissect` writes."""

from __future__ import annotations

import csv
import html
import io
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
from methods_multimodal.report._html import inline
from methods_multimodal.report._page import rounded

_THUMB = 96
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem }
body { color: #1c1e21 }
h1 { font-size: 1.35rem; margin-bottom: .2rem } h2 { font-size: 1.05rem; margin: 1.8rem 0 .5rem }
p { margin: .3rem 0; max-width: 60rem } .quiet { color: #666 }
table { border-collapse: collapse; font-size: 13px } th { text-align: left; font-weight: 600 }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #e4e6e9 } td.n { text-align: right }
.units { display: grid; grid-template-columns: repeat(auto-fill, minmax(540px, 1fr)); gap: 14px }
.unit { border: 1px solid #d8dbe0; border-radius: 6px; padding: 10px 12px }
.unit h3 { margin: 0 0 .35rem; font-size: 14px } .row { display: flex; gap: 4px; margin-bottom: 6px }
.row img { width: 60px; height: 60px; image-rendering: pixelated; border: 1px solid #ccc }
.plot { max-width: 100% } .hist { width: 210px; float: right; margin-left: 8px }
"""


def write_page(
    found: Survey,
    out: Path,
    *,
    model: str,
    pictures: Sequence[Image.Image],
    maps: dict[int, list[tuple[int, Float[Tensor, "row column"]]]],
    thresholds: Float[Tensor, " unit"] | None,
    shown: Any = None,
) -> tuple[Path, Path, Path]:
    """Writes OUT/index.html (self-contained), OUT/units.json and OUT/units.csv; returns their paths.

    `maps[unit]` are (picture number, map) for the pictures on the unit's card; units without are in the
    tables only. `shown [image, concept]` says which pictures show what, if that is known.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [_row(found, unit) for unit in range(found.activations.shape[1])]
    table = out / "units.csv"
    lines = io.StringIO()
    writer = csv.DictWriter(lines, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(table, lines.getvalue())
    numbers = out / "units.json"
    about = {
        "model": model,
        "site": found.site,
        "images": len(found.activations),
        "concepts": found.concepts.names,
    }
    write_json(numbers, {**about, "units": rows})
    page = out / "index.html"
    write_text(page, _page(found, model, pictures, maps, thresholds, shown))
    return page, numbers, table


def _row(found: Survey, unit: int) -> dict[str, Any]:
    row: dict[str, Any] = {"unit": unit}
    for one in found.methods:
        row[f"{one.method}"] = one.names[unit]
        row[f"{one.method}_score"] = rounded(one.scores[unit], 6)
        row[f"{one.method}_q"] = rounded(one.chance.q[unit], 6)
        row[f"{one.method}_correlation"] = rounded(one.follows[unit], 4)
        if one.faithful is not None:
            row[f"{one.method}_auroc"] = rounded(one.faithful.auroc[unit], 4)
    row["top_pictures"] = " ".join(map(str, found.top[unit].tolist()))
    return row


def _page(
    found: Survey,
    model: str,
    pictures: Sequence[Image.Image],
    maps: dict[int, list[tuple[int, Tensor]]],
    thresholds: Tensor | None,
    shown: Any,
) -> str:
    first = found.methods[0]
    kept = first.chance.significant()
    title = f"{found.site} of {model}"
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    detectors(
        first.names,
        kept,
        found.concepts,
        figure.subplots(),
        title=f"what units detect ({first.method}; {len(kept)} of {len(first.names)} better than chance)",
    )
    cards = "".join(_card(found, unit, pictures, maps[unit], thresholds, shown) for unit in maps)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{_t(title)}</title><style>{_STYLE}</style></head><body>
<h1>{_t(title)}</h1>
<p class="quiet">{found.activations.shape[1]} units, {len(found.activations)} pictures that name them and
others that check the names, {len(found.concepts)} concepts.</p>
<img class="plot" alt="detectors by category" src="{_plot(figure)}">
<h2>Methods</h2>{_methods(found)}
<p class="quiet">Better than chance: the best score against units whose pictures are shuffled, at a
false-discovery rate of 5 %. AUROC and correlation are on held-out pictures; the last column is what one name
for all units would reach.</p>
<h2>Units</h2>
<p class="quiet">Each with the pictures it is strongest on, darkened where it is not active.</p>
<div class="units">{cards}</div>
</body></html>
"""


def _methods(found: Survey) -> str:
    head = (
        "<tr><th>method</th><th>better than chance</th><th>held-out AUROC</th><th>held-out correlation</th>"
    )
    head += "<th>one name for all</th></tr>"
    lines = []
    for one in found.methods:
        auroc = same = "–"
        if one.faithful is not None:
            auroc = f"{float(one.faithful.auroc.mean()):.3f}"
            same = f"{float(one.faithful.constant.mean()):.3f} ({_t(one.faithful.constant_name)})"
        lines.append(
            f'<tr><td>{_t(one.method)}</td><td class="n">{len(one.chance.significant())}</td>'
            f'<td class="n">{auroc}</td>'
            f'<td class="n">{float(one.follows.mean()):+z.3f}</td><td class="n">{same}</td></tr>'
        )
    table = f"<table>{head}{''.join(lines)}</table>"
    same = agreement({one.method: one.names for one in found.methods})
    pairs = [
        f"{_t(a.method)} and {_t(b.method)} {float(same[i, j]):.0%}"
        for i, a in enumerate(found.methods)
        for j, b in enumerate(found.methods)
        if i < j
    ]
    return table + (f"<p>Units that two methods give the same name: {', '.join(pairs)}.</p>" if pairs else "")


def _card(
    found: Survey,
    unit: int,
    pictures: Sequence[Image.Image],
    maps: list[tuple[int, Tensor]],
    thresholds: Tensor | None,
    shown: Any,
) -> str:
    cut = float(thresholds[unit]) if thresholds is not None else None
    images = []
    for number, map_ in maps:
        level = cut if cut is not None and bool((map_ > cut).any()) else float(map_.flatten().quantile(0.9))
        small = pictures[number].convert("RGB").resize((_THUMB, _THUMB), Image.Resampling.NEAREST)
        images.append(f'<img alt="picture {number}" src="{_picture(exemplar(small, map_, level))}">')
    first = found.methods[0]
    concept = found.concepts.index(first.names[unit])
    figure = Figure(figsize=(2.9, 1.9), layout="constrained")
    values = found.activations[:, unit]
    activation_histogram(
        values,
        figure.subplots(),
        shown=None if shown is None else shown[: len(values), concept],
        name=first.names[unit],
    )
    lines = "".join(_line(one, unit) for one in found.methods)
    return f"""<div class="unit"><h3>unit {unit}: {_t(first.names[unit])}</h3>
<img class="hist" alt="activations of unit {unit}" src="{_plot(figure)}">
<div class="row">{"".join(images)}</div>
<table>{lines}</table></div>"""


def _line(one: Named, unit: int) -> str:
    check = "" if one.faithful is None else f'<td class="n">AUROC {float(one.faithful.auroc[unit]):.2f}</td>'
    return (
        f"<tr><td>{_t(one.method)}</td><td>{_t(one.names[unit])}</td>"
        f'<td class="n">{float(one.scores[unit]):z.3f}</td>'
        f'<td class="n">q {float(one.chance.q[unit]):.3f}</td>{check}</tr>'
    )


def _plot(figure: Figure) -> str:
    return inline(lambda out: figure.savefig(out, format="png", dpi=90))


def _picture(image: Image.Image) -> str:
    return inline(lambda out: image.save(out, "PNG", optimize=True))


def _t(text: str) -> str:
    return html.escape(text)


def strongest(found: Survey, n: int) -> list[int]:
    """The units worth a card: the surest of each name first, then the next of each."""
    first = found.methods[0]
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
