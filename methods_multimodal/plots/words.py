"""How much each word of a prompt is attended to, step by step."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from methods_multimodal.cross_attention import WordMaps
from methods_multimodal.plots.heatmap import new_axes


def word_lines(
    record: WordMaps, ax: Axes | None = None, *, image: int = 0, legend: Axes | None = None
) -> Axes:
    """A line for each word: its attention at each step, averaged over the picture.

    `legend` are axes for the names; they go beside the lines without.
    """
    ax = ax or new_axes()
    table = record.strength()[:, image].tolist()
    steps = range(1, len(table) + 1)
    lines = [
        ax.plot(steps, [row[i] for row in table], label=w, linewidth=1.5)[0]
        for i, w in enumerate(record.words_of(image))
    ]
    ax.set(xlabel="denoising step", ylabel="attention weight")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title("attention to each word (the rest goes to start, end and padding)", fontsize=10)
    if legend is None:
        ax.legend(fontsize=8)
    else:
        legend.axis("off")
        legend.legend(lines, record.words_of(image), fontsize=8, loc="center left")
    return ax
