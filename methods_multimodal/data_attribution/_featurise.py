"""From a batch of examples to projected gradient features, for one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from methods_multimodal.data_attribution._layers import add_to, has_factors, projected
from methods_multimodal.data_attribution.gradients import Gradients, Mode
from methods_multimodal.data_attribution.projection import Projection
from methods_multimodal.data_attribution.task import Batch, Task
from mm_adapters import InputError

Draws = Literal["mean", "unit"]
Block = tuple[str, int, int]


class Featuriser:
    """Features and values of batches; `load` puts another checkpoint's weights in.

    `blocks` are the runs of features that belong to one module: (its path, start, stop); a dense or
    sparse projection has one, of all.

    Raises: InputError if the task, the projection and `draws` do not go together.
    """

    def __init__(
        self, task: Task, sample: Batch, projection: Projection, *, draws: Draws, mode: Mode, max_rows: int
    ) -> None:
        self.task, self.projection, self.draws = task, projection, draws
        if draws not in ("mean", "unit"):
            raise InputError(f"Draws are averaged as 'mean' or 'unit', not {draws!r}.")
        if projection.kind == "factored":
            if draws == "unit" or mode not in ("auto", "layers"):
                raise InputError("A factored projection goes by layers and averages draws as 'mean'.")
            mode = "layers"
        paths = _factored_paths(task) if projection.kind == "factored" else None
        if paths is not None:
            names = tuple(n for n in task.parameters if n.rpartition(".")[0] in paths)
            task = Task(task.module, names, task.measures, task.n_draws, task.rows, task.values, task.about)
        self.gradients = Gradients(task, sample, mode=mode, max_rows=max_rows)
        self.device = next(iter(self.gradients.weights.values())).device
        self._sides: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        if paths is not None:
            self.blocks = self._factor(paths)
        else:
            self.project = projection.on(self.gradients.n_parameters, self.device)
            self.blocks = self._split() if projection.kind == "none" else [("all", 0, projection.dim)]

    @property
    def dim(self) -> int:
        """How many features an example has."""
        return self.blocks[-1][2]

    def load(self, state: Mapping[str, Tensor] | None) -> None:
        """Goes on with a checkpoint's weights; None: the module's own."""
        self.gradients.weights = self.gradients.task.weights(state)
        self.gradients.constants = self.gradients.task.constants(state)

    def __call__(self, batch: Batch, checkpoint: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """For each measure the features [example, feature] and the values [example], in float32.

        Raises: InputError naming examples whose gradient is not finite.
        """
        if self.projection.kind == "factored":
            features, values = self._factored(batch)
        else:
            full, values = (self.gradients.unit if self.draws == "unit" else self.gradients.full)(batch)
            features = {name: self.project(value, checkpoint) for name, value in full.items()}
        for name, value in features.items():
            bad = (~value.isfinite()).any(1).cpu()
            if bool(bad.any()):
                numbers = batch["index"].cpu()[bad].tolist()
                raise InputError(
                    f"The gradient of {name!r} is not finite for examples {numbers[:5]} of checkpoint "
                    f"{checkpoint}. Look at them, or compute in float32."
                )
        return features, values

    def _factored(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        n = len(batch["index"])
        totals: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for draws in self.gradients.chunks(n):
            measures, means = self.gradients.layer_calls(batch, draws)
            for measure, layers in measures.items():
                parts: list[Tensor] = []
                for path, names in self.gradients.owners.items():
                    layer, (into, out_of) = self.task.module.get_submodule(path), self._sides[path]
                    calls = [projected(layer, s, n, into, out_of, "bias" in names) for s in layers[path]]
                    parts.append(torch.stack(calls).sum(0).flatten(1).float())
                add_to(totals, {measure: torch.cat(parts, 1) / self.task.n_draws})
            add_to(values, {k: v * (len(draws) / self.task.n_draws) for k, v in means.items()})
        return totals, values

    def _factor(self, paths: list[str]) -> list[Block]:
        blocks: list[Block] = []
        for path in paths:
            weight = self.task.module.get_submodule(path).weight
            assert isinstance(weight, Tensor)
            in_width = weight[0].numel() + ("bias" in self.gradients.owners[path])
            into = self.projection.side(in_width, path, 0, self.device)
            out_of = self.projection.side(len(weight), path, 1, self.device)
            self._sides[path] = into, out_of
            width = (in_width if into is None else into.shape[1]) * (
                len(weight) if out_of is None else out_of.shape[1]
            )
            start = blocks[-1][2] if blocks else 0
            blocks.append((path, start, start + width))
        return blocks

    def _split(self) -> list[Block]:
        """The parameters' modules, one block each; a module's parameters stand together."""
        blocks: list[Block] = []
        for name, weight in self.gradients.weights.items():
            path = name.rpartition(".")[0]
            start = blocks[-1][2] if blocks else 0
            if blocks and blocks[-1][0] == path:
                _, start, stop = blocks.pop()
                blocks.append((path, start, stop + weight.numel()))
            else:
                blocks.append((path, start, start + weight.numel()))
        return blocks


def _factored_paths(task: Task) -> list[str]:
    paths = []
    for name in task.parameters:
        path, _, leaf = name.rpartition(".")
        layer: nn.Module = task.module.get_submodule(path)
        if leaf == "weight" and has_factors(layer):
            paths.append(path)
    if not paths:
        raise InputError(
            "A factored projection needs weights of linear or convolutional layers; there are none."
        )
    return paths
