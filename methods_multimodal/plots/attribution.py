"""Whose work a logit is: a cell for each head, a bar for each MLP and for the rest."""

from __future__ import annotations

from matplotlib.axes import Axes

from methods_multimodal.lenses.direct_attribution import LogitAttribution
from methods_multimodal.plots.heatmap import heatmap, new_axes


def head_shares(record: LogitAttribution, ax: Axes | None = None, *, row: int = 0, text: int = 0) -> Axes:
    """What each head adds to one logit."""
    shares = record.heads[row, text]
    small = shares.numel() <= 160
    return heatmap(
        shares,
        ax,
        unit="share of the logit",
        signed=True,
        rows=[str(i) for i in range(shares.shape[0])],
        columns=[str(i) for i in range(shares.shape[1])],
        write="+z.2f" if small else None,
        label_rows="layer",
        label_columns="head",
        title=f"what each head adds to: {record.texts[text]}",
    )


def mlp_shares(record: LogitAttribution, ax: Axes | None = None, *, row: int = 0, text: int = 0) -> Axes:
    """What each MLP and everything that is no head adds to one logit."""
    ax = ax or new_axes()
    named = record.shares(row, text)
    values = list(named.values())
    ax.barh(range(len(values)), values, color=["#b2182b" if v > 0 else "#2166ac" for v in values])
    ax.set_yticks(range(len(values)), list(named), fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.8)
    ax.tick_params(axis="x", labelsize=8)
    ax.set_xlabel("share of the logit", fontsize=8)
    ax.set_title(
        f"sum {float(record.total[row, text]):+z.4f}, the model's own {float(record.logit[row, text]):+z.4f}",
        fontsize=10,
    )
    return ax
