"""Where an answer comes from: restored states, blocked flows, heads that raise it."""

from __future__ import annotations

from matplotlib.axes import Axes

from methods_multimodal.patching import CausalTrace, HeadImportance, InformationFlow
from methods_multimodal.plots.heatmap import heatmap, new_axes

_COLOURS = ("#2166ac", "#b2182b", "#4d9221", "#762a83", "#b35806", "#35978f")


def trace_grid(record: CausalTrace, ax: Axes | None = None, *, title: str = "") -> Axes:
    """The share of the effect that each role's states carry in each window of layers, over all rows."""
    share = record.share()
    other = "clean" if record.into == "corrupted" else "corrupted"
    return heatmap(
        share.mean,
        ax,
        unit=f"share of the effect (1: as the {other} run)",
        signed=True,
        limit=max(1.0, float(share.mean.abs().max())),
        rows=[_span(window) for window in record.windows],
        columns=list(record.roles),
        write="z.2f" if share.mean.numel() <= 160 else None,
        label_rows=f"layer ({record.tower} {record.part.removeprefix('hook_')})",
        title=title or f"{other} states put into the {record.into} run; corrupted by {record.corruption}",
    )


def flow_lines(
    record: InformationFlow, ax: Axes | None = None, *, unit: str = "metric", title: str = ""
) -> Axes:
    """How far blocking each flow moves the metric, by window of layers, with 95 % intervals over rows."""
    ax = ax or new_axes()
    mean, (low, high) = record.effect.mean(-1), record.interval()
    at = range(len(record.windows))
    for i, (source, target) in enumerate(record.flows):
        colour = _COLOURS[i % len(_COLOURS)]
        ax.plot(at, mean[i].tolist(), marker="o", markersize=4, color=colour, label=f"{source} to {target}")
        ax.fill_between(at, low[i].tolist(), high[i].tolist(), color=colour, alpha=0.2, linewidth=0)
    ax.axhline(0.0, color="gray", linewidth=0.8)
    ax.set_xticks(list(at), [_span(window) for window in record.windows], fontsize=8)
    ax.tick_params(labelsize=8)
    ax.set_xlabel(f"layers of {record.tower} in which it is blocked", fontsize=8)
    ax.set_ylabel(f"change of the {unit}", fontsize=8)
    ax.legend(fontsize=8, frameon=False)
    ax.set_title(title or "attention blocked", fontsize=10)
    return ax


def head_importance_grid(record: HeadImportance, ax: Axes | None = None, *, title: str = "") -> Axes:
    """The mean increase over rows of each head of each layer."""
    mean = record.increase.mean(0)
    return heatmap(
        mean,
        ax,
        unit="increase of log p (nats)",
        signed=True,
        rows=[str(i) for i in range(mean.shape[0])],
        columns=[str(i) for i in range(mean.shape[1])],
        write="+z.2f" if mean.numel() <= 160 else None,
        label_rows="layer",
        label_columns="head",
        title=title or "what each head adds to the answer's log probability",
    )


def _span(window: tuple[int, ...]) -> str:
    return str(window[0]) if len(window) == 1 else f"{window[0]}-{window[-1]}"
