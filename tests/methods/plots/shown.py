"""What axes show, as plain values: every text, line, bar, picture, colour, tick and limit, with its place."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure

DIGITS = 5
MANY = 200  # Of so many values of a picture only their shape, mean and corners are kept.


NUMBER = re.compile(r"([-+−]?\d+\.\d+(?:e[-+]?\d+)?%?)")


def differences(found: Any, wanted: Any, where: str = "", rel: float = 1e-3, abs: float = 1e-4) -> list[str]:
    """Where two descriptions differ: words at all, numbers (in texts those with a point) by so much."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [*wanted, *(k for k in found if k not in wanted)]
        pairs = [(f"{where}.{k}", found.get(k), wanted.get(k)) for k in keys]
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(found, wanted, strict=True))]
    else:
        return [] if _alike(found, wanted, rel, abs) else [f"{where}: {found!r}, not {wanted!r}"]
    return [d for place, a, b in pairs for d in differences(a, b, place, rel, abs)]


def _alike(found: Any, wanted: Any, rel: float, abs: float) -> bool:
    if isinstance(found, str) and isinstance(wanted, str):
        one, other = NUMBER.split(found), NUMBER.split(wanted)
        values = [[float(x.strip("%").replace("−", "-")) for x in parts[1::2]] for parts in (one, other)]
        return one[::2] == other[::2] and values[0] == pytest.approx(values[1], rel=rel, abs=abs)
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return found == pytest.approx(wanted, rel=rel, abs=abs)
    return found == wanted


def numbers(values: Any) -> Any:
    """Numbers of any shape, rounded; a masked or missing one is None."""
    if isinstance(values, list | tuple):
        return [numbers(value) for value in values]
    if isinstance(values, np.ndarray):
        return numbers(np.ma.filled(values.astype(float), np.nan).tolist())
    number = float(values)
    return None if np.isnan(number) else float(f"{number:.{DIGITS}g}") + 0.0


def text(of: Any) -> list[Any]:
    """A text, its place, size, colour, where it is held and how it is turned."""
    how = (of.get_fontsize(), to_hex(of.get_color()), of.get_ha(), of.get_va(), of.get_rotation())
    return [of.get_text(), numbers(of.get_position()), " ".join(map(str, how))]


def _values(array: Any, most: int = MANY) -> Any:
    """The numbers of a picture, or of a large one what tells it from another."""
    values = np.ma.filled(np.ma.asarray(array).astype(float), np.nan)
    if values.size <= most:
        return numbers(values)
    flat = values.ravel()
    some = flat[np.linspace(0, flat.size - 1, 7).astype(int)]
    return {"shape": list(values.shape), "mean": numbers(np.nanmean(values)), "some": numbers(some)}


def described(value: Any) -> Any:
    """Plain data, with large tables of numbers as pictures are: by what tells them from others."""
    if isinstance(value, dict):
        return {str(key): described(one) for key, one in value.items()}
    if not isinstance(value, list | tuple):
        return value
    try:
        array = np.array(value, float)
    except (TypeError, ValueError):
        return [described(one) for one in value]
    return numbers(list(value)) if array.size <= 40 else _values(array, most=0)


def _norm(norm: Normalize) -> list[Any]:
    return [type(norm).__name__, numbers([norm.vmin, norm.vmax])]


def _picture(image: Any) -> dict[str, Any]:
    return {
        "values": _values(image.get_array()),
        "colours": image.get_cmap().name,
        "norm": _norm(image.norm),
        "extent": numbers(image.get_extent()),
        "alpha": image.get_alpha(),
        "between": image.get_interpolation(),
    }


def _line(line: Any) -> dict[str, Any]:
    return {
        "points": numbers(np.asarray(line.get_xydata())),
        "colour": to_hex(line.get_color()),
        "width": line.get_linewidth(),
        "style": line.get_linestyle(),
    }


def _bar(patch: Any) -> dict[str, Any]:
    box = patch.get_bbox().bounds if hasattr(patch, "get_bbox") else patch.get_extents().bounds
    return {"box": numbers(box), "colour": to_hex(patch.get_facecolor(), keep_alpha=True)}


def _collection(one: Any) -> dict[str, Any]:
    """Points of a scatter, lines of a contour or of an error bar."""
    paths = [numbers(path.vertices) for path in one.get_paths()]
    return {
        "kind": type(one).__name__,
        "at": numbers(np.asarray(one.get_offsets())),
        "paths": paths if len(paths) < 40 else len(paths),
        "edges": [to_hex(c) for c in one.get_edgecolor()],
        "widths": numbers(list(np.atleast_1d(one.get_linewidth()))),
        "sizes": numbers(list(one.get_sizes())) if hasattr(one, "get_sizes") else None,
    }


def _axis(axis: Any) -> dict[str, Any]:
    labels = axis.get_ticklabels()
    return {
        "label": [one for i, one in enumerate(text(axis.label)) if i != 1],  # Its place depends on the page.
        "ticks": numbers(list(axis.get_ticklocs())),
        "names": [label.get_text() for label in labels],
        "sizes": sorted({label.get_fontsize() for label in labels}),
        "turned": sorted({(label.get_rotation(), label.get_ha()) for label in labels}),
        "length": sorted({tick.tick1line.get_markersize() for tick in axis.get_major_ticks()}),
        "limits": numbers(list(axis.get_view_interval())),
        "inverted": bool(axis.get_inverted()),
    }


def of_axes(ax: Axes) -> dict[str, Any]:
    """What one pair of axes shows."""
    ax.figure.canvas.draw()
    legend = ax.get_legend()
    return {
        "title": text(ax.title),
        "is_on": ax.axison,
        "aspect": str(ax.get_aspect()),
        "x": _axis(ax.xaxis),
        "y": _axis(ax.yaxis),
        "texts": [text(one) for one in ax.texts],
        "pictures": [_picture(image) for image in ax.images],
        "lines": [_line(line) for line in ax.lines],
        "bars": [_bar(patch) for patch in ax.patches],
        "collections": [_collection(one) for one in ax.collections],
        "legend": None if legend is None else [text(one) for one in legend.get_texts()],
        "frame": [[to_hex(s.get_edgecolor()), s.get_linewidth()] for s in ax.spines.values()],
    }


def of_figure(figure: Figure) -> dict[str, Any]:
    """What a figure shows, its colour bars among its axes."""
    figure.canvas.draw()
    return {
        "size": numbers(list(figure.get_size_inches())),
        "texts": [text(one) for one in figure.texts],
        "axes": [of_axes(ax) for ax in figure.axes],
        "places": [numbers(list(ax.get_position().bounds)) for ax in figure.axes],
    }
