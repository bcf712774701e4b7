"""The sheet of probes as a page: every variable at every layer, with its nulls below."""

from __future__ import annotations

from typing import Any

import torch

from methods_multimodal.plots.probing import probe_sheet, probe_steps
from methods_multimodal.probing.sheet import Kind, ProbeSheet
from methods_multimodal.report._page import Report, new_page

_TITLES: dict[Kind, str] = {
    "task": "accuracy",
    "control": "control task (learned by heart)",
    "twin": "twin",
    "shuffled": "shuffled labels",
}


def probe_report(record: ProbeSheet) -> Report:
    """A page: roles across, accuracy and nulls downwards; of a sampling loop, variables by step."""
    figure = _steps(record) if len(record.steps) > 1 else _roles(record)
    return Report(figure, _numbers(record), _lines(record))


def _roles(record: ProbeSheet) -> Any:
    across = max(4.5, 1.6 + 0.75 * len(record.sites))
    down = 1.5 + 0.36 * len(record.variables)
    title = f"{record.model}: what {record.head} probes read"
    figure = new_page(across * len(record.roles), down * len(record.kinds) + 0.5, title)
    for row, kind in zip(
        figure.subplots(len(record.kinds), len(record.roles), squeeze=False), record.kinds, strict=True
    ):
        for ax, role in zip(row, record.roles, strict=True):
            probe_sheet(record, ax, kind=kind, role=role, title=f"{role} tokens: {_TITLES[kind]}")
    return figure


def _steps(record: ProbeSheet) -> Any:
    title = f"{record.model}: what {record.head} probes read, by site and step"
    n = len(record.variables)
    width = 2.5 + 0.6 * len(record.steps)
    figure = new_page(width * n, (1.5 + 0.4 * len(record.sites)) * len(record.roles), title)
    for row, role in zip(figure.subplots(len(record.roles), n, squeeze=False), record.roles, strict=True):
        for ax, variable, guess in zip(row, record.variables, record.guess.tolist(), strict=True):
            title = f"{variable}, {role} tokens (commonest class {guess:.0%})"
            probe_steps(record, variable, ax, role=role, title=title)
    return figure


def _numbers(record: ProbeSheet) -> dict[str, Any]:
    intervals = {kind: record.interval(kind) for kind in record.kinds}
    accuracies = {kind: record.accuracy(kind) for kind in record.kinds}
    places = []
    for index in torch.cartesian_prod(*(torch.arange(n) for n in record.strength.shape)).tolist():
        v, layer, role, step = index
        kinds = {
            kind: [
                float(accuracies[kind][v, layer, role, step]),
                *intervals[kind][:, v, layer, role, step].tolist(),
            ]
            for kind in record.kinds
        }
        places.append(
            {
                "variable": record.variables[v],
                "site": record.sites[layer],
                "role": record.roles[role],
                "step": record.steps[step] if record.steps else None,
                "accuracy, low, high": kinds,
            }
        )
    return {
        "model": record.model,
        "head": record.head,
        "test rows": record.right.shape[-1],
        "classes": dict(zip(record.variables, map(list, record.classes), strict=True)),
        "commonest class": dict(zip(record.variables, record.guess.tolist(), strict=True)),
        "places": places,
    }


def _lines(record: ProbeSheet) -> tuple[str, ...]:
    lines = []
    for variable, guess in zip(record.variables, record.guess.tolist(), strict=True):
        for role in record.roles:
            # The step is chosen on validation rows too.
            v, r = record.variables.index(variable), record.roles.index(role)
            best = int(record.validation[0, v, :, r].flatten().argmax())
            layer, at = divmod(best, record.validation.shape[-1])
            step = record.steps[at] if record.steps else None
            values, (low, high) = record.curve(variable, role, step)
            where = record.sites[layer] + ("" if step is None else f", step {step}")
            line = f"{variable}, {role}: {float(values[layer]):.0%} ({float(low[layer]):.0%} to "
            line += f"{float(high[layer]):.0%}) at {where}; commonest class {guess:.0%}"
            for kind in ("control", "twin"):
                if kind in record.kinds:
                    line += f", {kind} {float(record.curve(variable, role, step, kind)[0][layer]):.0%}"
            lines.append(line)
    return tuple(lines)
