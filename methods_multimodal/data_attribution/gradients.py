"""The gradient of each example's measurement, by layers where that is exact, by torch.func elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from methods_multimodal.data_attribution._layers import LayerCall, add_to, owned, rule_for
from methods_multimodal.data_attribution.layer_gradients import NotByLayers, layer_pass
from methods_multimodal.data_attribution.task import Batch, Task
from mm_adapters import InputError

Mode = Literal["auto", "layers", "vmap", "loop"]

_log = logging.getLogger(__name__)
# Two ways to the same float32 gradient agree far better; rows told apart wrongly do far worse.
_SAME = 1e-3


class Gradients:
    """Per-example gradients of a task, under one checkpoint's weights.

    `mode` is "layers" (one batched pass; each layer's gradient comes apart by example), "vmap"
    (torch.func), "loop" (a backward pass for each example, for any module), or "auto": layers if every
    chosen parameter belongs to a layer that allows it and two examples of `sample` agree with plain
    backward passes; else vmap, unless the module's code looks at values, which vmap cannot.

    Raises: InputError if the module is in training mode, or "layers" was asked for and cannot be.
    """

    def __init__(
        self,
        task: Task,
        sample: Batch,
        state: Mapping[str, Tensor] | None = None,
        *,
        mode: Mode = "auto",
        max_rows: int = 128,
    ) -> None:
        if task.module.training:
            raise InputError(
                "The module is in training mode, where examples are not independent: call eval()."
            )
        self.task = task
        self.max_rows = max_rows
        self.weights = task.weights(state)
        self.constants = task.constants(state)
        self.owners = owned(task.parameters, task.module)
        self.n_parameters = sum(w.numel() for w in self.weights.values())
        self.mode: Mode = mode
        if mode in ("auto", "layers"):
            reason = self._against_layers(sample)
            if reason is None:
                self.mode = "layers"
            elif mode == "layers":
                raise InputError(f"Gradients cannot be taken by layers: {reason}. Pass mode='vmap'.")
            else:
                self.mode = "vmap" if self._vmaps(sample) else "loop"
                _log.info("gradients by %s: %s", self.mode, reason)

    def full(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """For each measure the gradients [example, parameter] and the values [example], in float32.

        Both are averaged over the draws; the parameters are all of the task's, in its order.
        """
        grads: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for draws in self.chunks(len(batch["index"])):
            part, part_values = self._part(batch, draws)
            share = len(draws) / self.task.n_draws
            add_to(grads, {name: value * share for name, value in part.items()})
            add_to(values, {name: value * share for name, value in part_values.items()})
        return grads, values

    def unit(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Like `full`, with the gradient of each draw scaled to length one before averaging."""
        grads: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for draw in range(self.task.n_draws):
            part, part_values = self._part(batch, range(draw, draw + 1))
            for value in part.values():
                value.div_(value.norm(dim=1, keepdim=True).clamp_min(torch.finfo(value.dtype).tiny))
            add_to(grads, {name: value / self.task.n_draws for name, value in part.items()})
            add_to(values, {name: value / self.task.n_draws for name, value in part_values.items()})
        return grads, values

    def chunks(self, n: int) -> Iterator[range]:
        """The draws, as many at a time as `max_rows` allows for n examples."""
        step = max(1, self.max_rows // max(n, 1))
        for start in range(0, self.task.n_draws, step):
            yield range(start, min(start + step, self.task.n_draws))

    def layer_calls(
        self, batch: Batch, draws: range
    ) -> tuple[dict[str, dict[str, list[LayerCall]]], dict[str, Tensor]]:
        """Each layer's calls, with gradients of the sum over these draws; and the values' means."""
        n = len(batch["index"])
        layers, values = layer_pass(
            self.task,
            self.rows(batch, draws),
            n * len(draws),
            list(self.owners),
            self.weights,
            self.constants,
        )
        return layers, {k: v.float().unflatten(0, (n, len(draws))).mean(1) for k, v in values.items()}

    def rows(self, batch: Batch, draws: range) -> dict[str, Tensor]:
        """The batch laid out as rows on the module's device."""
        device = next(iter(self.weights.values())).device
        return {k: v.to(device) for k, v in self.task.rows(batch, draws).items()}

    def _part(self, batch: Batch, draws: range) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.mode == "layers":
            return self._by_layers(batch, draws)
        if self.mode == "vmap":
            return self._by_vmap(batch, draws)
        ones = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["index"]))]
        each = [self._plain(one, draws) for one in ones]
        return (
            {name: torch.stack([grads[name] for grads, _ in each]) for name in self.task.measures},
            {name: torch.stack([values[name] for _, values in each]) for name in self.task.measures},
        )

    def _by_layers(self, batch: Batch, draws: range) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        n = len(batch["index"])
        out: dict[str, Tensor] = {}
        measures, values = self.layer_calls(batch, draws)
        for measure, layers in measures.items():
            gradients: dict[str, Tensor] = {}
            for path, names in self.owners.items():
                layer = self.task.module.get_submodule(path)
                rule = rule_for(layer)
                assert rule is not None
                for one in layers[path]:
                    part = rule(layer, one, n)
                    add_to(gradients, {names[k]: v for k, v in part.items() if k in names})
            flat = [gradients[name].flatten(1).float() for name in self.task.parameters]
            out[measure] = torch.cat(flat, 1).div_(len(draws))
        return out, values

    def _by_vmap(self, batch: Batch, draws: range) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        n = len(batch["index"])
        rows = {k: v.unflatten(0, (n, len(draws))) for k, v in self.rows(batch, draws).items()}
        task, constants = self.task, self.constants

        def one(
            weights: dict[str, Tensor], example: dict[str, Tensor]
        ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
            def measured(weights: dict[str, Tensor]) -> dict[str, Tensor]:
                measures = task.values(task.call(weights, constants), example)
                return {name: measures[name].mean() for name in task.measures}

            values, back, *_ = vjp(measured, weights)
            zero = {name: torch.zeros_like(v) for name, v in values.items()}
            return {name: back(zero | {name: torch.ones_like(values[name])})[0] for name in values}, values

        # The fused kernel has no batching rule on the CPU: vmap would run it row by row.
        with sdpa_kernel(SDPBackend.MATH):
            gradients, values = vmap(one, in_dims=(None, 0))(self.weights, rows)
        flat = {
            name: torch.cat([grads[p].flatten(1).float() for p in task.parameters], 1)
            for name, grads in gradients.items()
        }
        return flat, {name: value.float() for name, value in values.items()}

    def _vmaps(self, sample: Batch) -> bool:
        try:
            self._by_vmap({k: v[:1] for k, v in sample.items()}, range(1))
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            return False
        return True

    def _against_layers(self, sample: Batch) -> str | None:
        """Why gradients cannot be taken by layers; None if they can."""
        for path in self.owners:
            layer = self.task.module.get_submodule(path)
            if rule_for(layer) is None:
                return (
                    f"{path or 'the module itself'} ({type(layer).__name__}) does not come apart by example"
                )
        draws = range(min(2, self.task.n_draws))
        try:
            by_layers, _ = self._by_layers(sample, draws)
        except NotByLayers as error:
            return str(error)
        for i in {0, len(sample["index"]) - 1}:
            plain, _ = self._plain({k: v[i : i + 1] for k, v in sample.items()}, draws)
            for name, expected in plain.items():
                off = (by_layers[name][i] - expected).norm() / expected.norm().clamp_min(1e-30)
                if not bool(off < _SAME):
                    return f"the layers' gradient of {name} is {float(off):.2g} away from a backward pass"
        return None

    def _plain(self, batch: Batch, draws: range) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        weights = {k: v.clone().requires_grad_() for k, v in self.weights.items()}
        with torch.enable_grad():
            measures = self.task.values(self.task.call(weights, self.constants), self.rows(batch, draws))
            out = {}
            for name in self.task.measures:
                grads = torch.autograd.grad(
                    measures[name].mean(), list(weights.values()), retain_graph=True, materialize_grads=True
                )
                out[name] = torch.cat([g.flatten().float() for g in grads])
        return out, {name: measures[name].detach().float().mean() for name in self.task.measures}


def per_example_gradients(
    task: Task,
    batch: Batch,
    state: Mapping[str, Tensor] | None = None,
    *,
    mode: Mode = "auto",
    max_rows: int = 128,
) -> dict[str, dict[str, Tensor]]:
    """For each measure the gradient by each parameter, [example, *its shape], averaged over draws.

    Raises: InputError as `Gradients` does.
    """
    gradients = Gradients(task, batch, state, mode=mode, max_rows=max_rows)
    out: dict[str, dict[str, Tensor]] = {}
    for measure, flat in gradients.full(batch)[0].items():
        parts = flat.split([w.numel() for w in gradients.weights.values()], 1)
        out[measure] = {
            name: part.reshape(-1, *w.shape)
            for part, (name, w) in zip(parts, gradients.weights.items(), strict=True)
        }
    return out
