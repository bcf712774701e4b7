"""The input and the output gradient of every chosen layer, from one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from methods_multimodal.data_attribution._layers import LayerCall
from methods_multimodal.data_attribution.task import Batch, Task


class NotByLayers(Exception):
    """A layer's calls cannot be told apart by row; gradients must be taken another way."""


def layer_pass(
    task: Task,
    rows: Batch,
    n_rows: int,
    paths: Sequence[str],
    weights: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, list[LayerCall]]], dict[str, Tensor]]:
    """For each measure and layer its calls, with gradients of the sum over rows; and the values.

    No parameter needs a gradient, so none is computed: only those of the layers' outputs.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []
    anchor: list[Tensor] = []

    def keep(path: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> Tensor:
            inputs = args[0] if args else next(iter(kwargs.values()))
            if len(inputs) != n_rows or len(out) != n_rows:
                raise NotByLayers(
                    f"{path} is called with {len(inputs)} rows and gives {len(out)}, where {n_rows} run"
                )
            if not anchor:
                anchor.append(torch.zeros((), device=out.device, requires_grad=True))
            out = out if out.requires_grad else out + anchor[0].to(out.dtype)
            calls.append((path, inputs.detach(), out))
            return out

        return hook

    handles = [task.module.get_submodule(p).register_forward_hook(keep(p), with_kwargs=True) for p in paths]  # type: ignore[arg-type]
    try:
        with torch.enable_grad():
            values = task.values(task.call(weights, constants), rows)
    finally:
        for handle in handles:
            handle.remove()
    uncalled = set(paths) - {path for path, _, _ in calls}
    if uncalled:
        raise NotByLayers(f"{sorted(uncalled)[0]} is not called: something else computes with its weights")
    layers = {name: _backward(values[name], calls, last=name == task.measures[-1]) for name in task.measures}
    return layers, {name: values[name].detach() for name in task.measures}


def _backward(
    value: Tensor, calls: Sequence[tuple[str, Tensor, Tensor]], last: bool
) -> dict[str, list[LayerCall]]:
    grads = torch.autograd.grad(
        value.sum(), [out for _, _, out in calls], retain_graph=not last, materialize_grads=True
    )
    layers: dict[str, list[LayerCall]] = {}
    for (path, inputs, _), grad in zip(calls, grads, strict=True):
        layers.setdefault(path, []).append(LayerCall(inputs, grad))
    return layers
