"""How much of the difference each patched piece brings back."""

from __future__ import annotations

from matplotlib.axes import Axes

from methods_multimodal.patching.activation_patching import ActivationPatching
from methods_multimodal.plots.heatmap import heatmap


def patch_effects(
    record: ActivationPatching, ax: Axes | None = None, *, row: int = 0, title: str = ""
) -> Axes:
    """The effect of each unit of each layer; 0 is the corrupted run, 1 the clean one."""
    effect = record.effect[row]
    return heatmap(
        effect,
        ax,
        unit="effect (0 corrupted, 1 clean)",
        signed=True,
        rows=[str(i) for i in record.layers],
        columns=[str(unit[0]) for unit in record.units],
        write="+z.2f" if effect.numel() <= 160 else None,
        label_rows="layer",
        label_columns="head" if record.axis == "head" else "position",
        title=title or f"patching each {record.axis}",
    )
