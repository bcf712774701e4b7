"""Runs in which nodes have the values of another run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from methods_multimodal.circuits.nodes import Node
from methods_multimodal.circuits.pairs import Metric
from mm_adapters import Call, Edit, InputError, Model, Read, Run


@dataclass(frozen=True)
class Stored:
    """The values of sites in one run, the calls they are of, and the metric of each row.

    `no_image` is where no image stands in the language tower's sequence; None if none is put there.
    """

    values: Mapping[str, Tensor]
    calls: Mapping[str, tuple[Call, ...]]
    metric: Float[Tensor, " row"]
    no_image: Bool[Tensor, "row pos"] | None = None

    def only(self, node: Node) -> Bool[Tensor, "row pos"] | None:
        """Where a node is its site; None if everywhere."""
        return self.no_image if node.beside_images else None


def rows_of(model: Model) -> Literal["all", "cond"]:
    """The rows under the prompt where a loop is guided; all rows else."""
    return "cond" if any(guidance is not None for guidance in model.loops().values()) else "all"


def sites_of(nodes: Sequence[Node]) -> list[str]:
    """The sites of the nodes, each once."""
    return list(dict.fromkeys(node.site for node in nodes))


def store(
    model: Model,
    inputs: Mapping[str, Any],
    nodes: Sequence[Node],
    metric: Metric,
    more: Sequence[str] = (),
) -> Stored:
    """A run of which the nodes' sites, and more, are kept."""
    sites = list(dict.fromkeys([*sites_of(nodes), *more]))
    no_image = _no_image(model, inputs) if any(node.beside_images for node in nodes) else None
    run = model.run(inputs, read=[Read(site, rows=rows_of(model)) for site in sites])
    return Stored({s: run.values[s] for s in sites}, run.calls, row_values(metric, run), no_image)


def row_values(metric: Metric, run: Run) -> Float[Tensor, " row"]:
    """The metric of each row. Raises: InputError if it is not a number for each."""
    with torch.no_grad():
        value = metric(run.output)
    if not isinstance(value, Tensor) or value.ndim != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"The metric gave {got}. It gives one number for each row of the output.")
    if not bool(value.isfinite().all()):
        raise InputError("The metric is not a finite number for some rows. Use logits, or their difference.")
    return value.detach().float().cpu()


def patch_nodes(model: Model, nodes: Collection[Node], source: Stored) -> list[Edit]:
    """The edits that give these nodes the values of a stored run, one for each site."""
    by_site: dict[str, list[Node]] = {}
    for node in nodes:
        by_site.setdefault(node.site, []).append(node)
    rows = rows_of(model)
    return [
        Edit(site, _put(source, site, of_site), rows=rows, steps=_steps(of_site))
        for site, of_site in by_site.items()
    ]


def patched_metric(
    model: Model, inputs: Mapping[str, Any], nodes: Collection[Node], source: Stored, metric: Metric
) -> Float[Tensor, " row"]:
    """The metric of each row when these nodes have the values of a stored run."""
    return row_values(metric, model.run(inputs, edit=patch_nodes(model, nodes, source)))


def _put(stored: Stored, site: str, nodes: Sequence[Node]) -> Callable[..., Tensor]:
    values = stored.values[site]
    number = {call: i for i, call in enumerate(stored.calls.get(site, ()))}
    only = stored.only(nodes[0])

    def put(value: Tensor, call: Call) -> Tensor:
        source = (values[number[call]] if number else values).to(value)
        now = [node for node in nodes if node.steps is None or call.step in node.steps]
        if any(node.head is None for node in now):
            return source.clone() if only is None else torch.where(only[..., None], source, value)
        heads = [node.head for node in now]
        new = value.clone()
        new[..., heads, :] = source[..., heads, :]
        return new

    return put


def _no_image(model: Model, inputs: Mapping[str, Any]) -> Bool[Tensor, "row pos"] | None:
    layout = model.layout(**inputs).get("language")
    if layout is None or not layout.image_index:
        return None
    here = [[image is None for image in row] for row in layout.image_index]
    return torch.tensor(here, device=model.device)


def _steps(nodes: Sequence[Node]) -> tuple[int, ...] | None:
    groups = [node.steps for node in nodes]
    if any(group is None for group in groups):
        return None
    return tuple(sorted({step for group in groups for step in group or ()}))
