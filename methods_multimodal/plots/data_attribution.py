"""Pictures of data attribution: a query with what helped and harmed it, and how good scorers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from methods_multimodal.plots.heatmap import new_axes
from methods_multimodal.plots.picture import picture

_HELPFUL, _HARMFUL = "#1b7837", "#b2182b"


@runtime_checkable
class Interval(Protocol):
    """A mean and its interval: an `Estimate`, a `Chosen`."""

    @property
    def mean(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def sources(
    query: Any,
    scores: Float[Tensor, " example"],
    show: Any,
    *,
    title: str = "",
    captions: Sequence[str] | None = None,
    n: int = 6,
) -> Figure:
    """A query and the `n` training images that helped it most, and that harmed it most, with their scores.

    `show(i)` gives training image number i; scores are shown in units of the largest size.
    """
    n = min(n, len(scores))
    order = scores.argsort(descending=True)
    most = float(scores.abs().max()) or 1.0
    figure = Figure(figsize=(1.5 * (n + 1.6), 5.2), layout="constrained")
    grid = figure.add_gridspec(2, n + 1, width_ratios=[1.6] + [1.0] * n)
    picture(query, figure.add_subplot(grid[:, 0]), title=_wrapped(title, 24))
    rows = (("helped most", _HELPFUL, order[:n]), ("harmed most", _HARMFUL, order.flip(0)[:n]))
    for row, (label, colour, chosen) in enumerate(rows):
        for column, i in enumerate(chosen.tolist()):
            ax = figure.add_subplot(grid[row, column + 1])
            about = f"\n{_wrapped(str(captions[i]), 22)}" if captions is not None else ""
            picture(show(i), ax, title=f"{float(scores[i]) / most:+z.2f}", caption=f"no. {i}{about}")
            ax.title.set_color(colour if (scores[i] > 0) == (row == 0) else "black")
            ax.xaxis.label.set_fontsize(7)
            for spine in ax.spines.values():
                spine.set_color(colour)
                spine.set_linewidth(2)
            if column == 0:
                ax.set_ylabel(label, fontsize=10, color=colour)
    figure.supxlabel("scores in units of the largest", fontsize=8)
    return figure


def score_bars(
    intervals: Mapping[str, Interval | Sequence[Interval]],
    ax: Axes | None = None,
    *,
    groups: Sequence[str] = (),
    title: str = "",
    unit: str = "linear datamodeling score",
) -> Axes:
    """A bar with its interval for each scorer, or one for each group of queries."""
    ax = ax or new_axes()
    names = list(intervals)
    parts = [list(v) if isinstance(v, Sequence) else [v] for v in intervals.values()]
    n_groups = max(map(len, parts))
    height = 0.8 / n_groups
    for group in range(n_groups):
        at = [i + (group - (n_groups - 1) / 2) * height for i in range(len(names))]
        values = [p[group] for p in parts]
        spread = [[v.mean - v.low for v in values], [v.high - v.mean for v in values]]
        ax.barh(
            at,
            [v.mean for v in values],
            height,
            xerr=spread,
            color=f"C{group}",
            capsize=3,
            error_kw={"linewidth": 1},
            label=groups[group] if groups else None,
        )
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel(unit, fontsize=9)
    ax.set_title(title, fontsize=10)
    if groups:
        ax.legend(fontsize=8)
    return ax


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
