"""What ablating neurons does beside its controls."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from methods_multimodal.neurons import NeuronAblation
from methods_multimodal.plots.heatmap import new_axes

_COLOURS = ("#b2182b", "#2166ac", "#888888")


def neuron_ablations(
    records: Mapping[str, NeuronAblation], ax: Axes | None = None, *, unit: str = "metric", title: str = ""
) -> Axes:
    """By name: how far the neurons move the metric, and how far each control does, with 95 % intervals."""
    ax = ax or new_axes()
    for i, record in enumerate(records.values()):
        estimates = {
            "named": record.effect(),
            "matched in layer and norm": record.control_effect(),
            "as much, random direction": record.control_effect("turned"),
        }
        for j, (label, one) in enumerate(estimates.items()):
            bounds = [[one.mean - one.low], [one.high - one.mean]]
            ax.errorbar(
                [one.mean],
                [i + 0.2 * (j - 1)],
                xerr=bounds,
                fmt="o",
                markersize=4,
                capsize=2,
                color=_COLOURS[j],
                label=label if not i else None,
            )
    ax.axvline(0.0, color="gray", linewidth=0.8)
    ax.set_yticks(range(len(records)), list(records), fontsize=8)
    ax.set_ylim(len(records) - 0.5, -0.5)
    ax.tick_params(labelsize=8)
    ax.set_xlabel(f"change of the {unit}", fontsize=8)
    ax.legend(fontsize=8, frameon=False, loc="best")
    ax.set_title(title or "neurons ablated", fontsize=10)
    return ax
