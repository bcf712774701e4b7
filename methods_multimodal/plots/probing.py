"""What probes read, by place, beside what their nulls do."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from methods_multimodal.plots.heatmap import heatmap, new_axes
from methods_multimodal.probing.code_length import CodeLength
from methods_multimodal.probing.dimensions import IntrinsicProbe
from methods_multimodal.probing.modality_shares import ModalityShares
from methods_multimodal.probing.prompts import PromptProbe
from methods_multimodal.probing.sheet import Kind, ProbeSheet

_COLOURS = ("#2166ac", "#b2182b", "#1b7837", "#762a83", "#e08214", "#543005")
_NULLS: dict[Kind, tuple[str, str]] = {"control": (":", "control task"), "twin": ("--", "twin")}


def probe_sheet(
    record: ProbeSheet,
    ax: Axes | None = None,
    *,
    kind: Kind = "task",
    role: str | None = None,
    step: int | None = None,
    title: str = "",
) -> Axes:
    """Accuracy of every variable (downwards) at every layer, for one role and step (None: the first).

    Beside each variable stands how often the commonest class is right.
    """
    role = record.roles[0] if role is None else role
    step = record.steps[0] if step is None and record.steps else step
    table = [record.curve(variable, role, step, kind)[0] for variable in record.variables]
    guesses = [f"{v} ({g:.0%})" for v, g in zip(record.variables, record.guess.tolist(), strict=True)]
    where = f"{role} tokens" if step is None else f"{role} tokens, step {step}"
    return heatmap(
        table[0].new_tensor([row.tolist() for row in table]),
        ax,
        unit="accuracy on test rows",
        limit=1.0,
        rows=guesses,
        columns=[_short(site) for site in record.sites],
        write=".2f",
        label_rows="variable (commonest class)",
        label_columns="site",
        title=title or f"{record.model}: {record.head} probes at {where}",
    )


def probe_steps(
    record: ProbeSheet, variable: str, ax: Axes | None = None, *, role: str | None = None, title: str = ""
) -> Axes:
    """Accuracy of one variable at every layer (downwards) and step, for one role (None: the first)."""
    role = record.roles[0] if role is None else role
    steps = [record.curve(variable, role, step)[0].tolist() for step in record.steps or (None,)]
    table = record.guess.new_tensor(steps).T
    return heatmap(
        table,
        ax,
        unit="accuracy on test rows",
        limit=1.0,
        rows=[_short(site) for site in record.sites],
        columns=[str(step) for step in record.steps] or ["-"],
        write=".2f",
        label_rows="site",
        label_columns="step",
        title=title or f"{record.model}: {variable} at {role} tokens",
    )


def probe_curve(
    record: ProbeSheet, variable: str, ax: Axes | None = None, *, step: int | None = None
) -> Axes:
    """Accuracy by layer and role, with intervals; the control task dotted, the twin dashed, chance gray."""
    ax = ax or new_axes()
    layers = list(range(len(record.sites)))
    for role, colour in zip(record.roles, _COLOURS * len(record.roles), strict=False):
        values, (low, high) = record.curve(variable, role, step)
        ax.plot(layers, values.tolist(), color=colour, marker="o", markersize=3, label=role)
        ax.fill_between(layers, low.tolist(), high.tolist(), color=colour, alpha=0.15, linewidth=0)
        for kind, (style, name) in _NULLS.items():
            if kind in record.kinds:
                null, _ = record.curve(variable, role, step, kind)
                ax.plot(layers, null.tolist(), style, color=colour, linewidth=1, label=f"{role}, {name}")
    guess = float(record.guess[record.variables.index(variable)])
    ax.axhline(guess, color="gray", linewidth=0.8, label="commonest class")
    ax.set_xticks(layers, [_short(site) for site in record.sites], fontsize=8)
    ax.set(xlabel="site", ylabel="accuracy on test rows", ylim=(0, 1.03))
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    at = "" if step is None else f", step {step}"
    ax.set_title(f"{record.model}: {variable}{at}", fontsize=10)
    return ax


def code_curve(record: CodeLength, ax: Axes | None = None, *, title: str = "") -> Axes:
    """What a label costs as more labels are known: the task's, the shuffled labels', and the uniform code."""
    ax = ax or new_axes()
    sizes = record.ends.diff(prepend=record.ends.new_zeros(1))
    names = (("labels", record.task, _COLOURS[0]), ("shuffled labels", record.shuffled, "gray"))
    for name, bits, colour in names:
        for i, row in enumerate(bits / sizes):
            ax.plot(
                record.ends.tolist(),
                row.tolist(),
                color=colour,
                marker="o",
                markersize=3,
                linewidth=1,
                label=None if i else name,
            )
    ax.axhline(record.uniform, color="black", linewidth=0.8, linestyle=":", label="uniform code")
    ax.set_xscale("log")
    ax.set(xlabel="labels sent", ylabel="bits for a label of the block")
    ax.legend(fontsize=8)
    compression = record.compression
    ax.set_title(
        title
        or f"{record.variable}: {compression.mean:.1f} times shorter than uniform "
        f"({compression.low:.1f} to {compression.high:.1f})",
        fontsize=10,
    )
    return ax


def dimension_curve(record: IntrinsicProbe, ax: Axes | None = None, *, title: str = "") -> Axes:
    """What the first k dimensions get right, beside k random ones (a line for each draw)."""
    ax = ax or new_axes()
    counts = list(range(1, len(record.dimensions) + 1))
    for i, row in enumerate(record.random_accuracy.tolist()):
        ax.plot(counts, row, color="gray", linewidth=0.6, alpha=0.6, label=None if i else "random dimensions")
    ax.plot(counts, record.accuracy.tolist(), color=_COLOURS[0], marker="o", markersize=3, label="picked")
    for k, dimension in zip(counts[:8], record.dimensions.tolist(), strict=False):
        ax.annotate(
            str(dimension),
            (k, float(record.accuracy[k - 1])),
            textcoords="offset points",
            xytext=(0, 6),
            fontsize=7,
            ha="center",
        )
    ax.axhline(record.guess, color="black", linewidth=0.8, linestyle=":", label="commonest class")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="dimensions", ylabel="accuracy on test rows", ylim=(0, 1.08))
    ax.legend(fontsize=8, loc="lower right")
    ax.set_title(title or f"{record.variable}: which dimensions hold it", fontsize=10)
    return ax


def token_shares(record: ModalityShares, ax: Axes | None = None, *, item: int = 0, title: str = "") -> Axes:
    """What each word and each square of the picture adds to one input's metric, with its standard error."""
    ax = ax or new_axes()
    names, values = record.of(item)
    own = record.item == item
    colours = [_COLOURS[1] if word else _COLOURS[0] for word in record.is_text[own].tolist()]
    places = list(range(len(names)))
    ax.barh(
        places, values.tolist(), xerr=record.error[own].tolist(), color=colours, error_kw={"linewidth": 0.8}
    )
    ax.set_yticks(places, list(names), fontsize=7)
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel("Shapley value, in units of the metric", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    share, even = float(record.text_share[item]), float(record.text_players[item])
    ax.set_title(
        title or f"words {share:.0%} of the sum of absolute values ({even:.0%} of the tokens)", fontsize=10
    )
    return ax


def answer_table(record: PromptProbe, ax: Axes | None = None, *, title: str = "") -> Axes:
    """Which value each picture's answer is (across), by its true one (downwards)."""
    low, high = record.interval()
    said = f"right {record.accuracy:.0%} ({low:.0%} to {high:.0%}), by chance {record.shuffled_accuracy:.0%}"
    return heatmap(
        record.confusion,
        ax,
        unit="share of the pictures with this value",
        limit=1.0,
        rows=record.values,
        columns=record.values,
        write=".2f",
        label_rows="true value",
        label_columns="answer",
        title=title or said,
    )


def _short(site: str) -> str:
    """The layer of "tower.blocks.3.hook_resid_post", else the site without its tower."""
    parts = site.split(".")
    return parts[2] if len(parts) > 3 and parts[2].isdecimal() else ".".join(parts[1:])
