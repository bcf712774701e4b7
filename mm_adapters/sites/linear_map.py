"""The matrix that a linear module multiplies with: with its active adapters, and unpacked."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from mm_adapters._errors import ModelStateError
from mm_adapters.sites.held import held


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a module as it computes with it now.

    Of a linear module around which an adapter lies, or whose weight is stored packed, it is what the module
    makes of the unit vectors.

    Raises: ModelStateError if it is stored in another form and the module cannot be asked so.
    """
    if hasattr(module, "base_layer"):
        return _asked(module)
    weight: Any = held(module, "weight")
    if callable(weight):  # torch.ao's quantised linears.
        return cast(Any, weight)().dequantize()
    # torch's own packed tensors, and the classes of torchao and quanto.
    if isinstance(weight, Tensor) and (
        weight.is_quantized or type(weight).dequantize is not Tensor.dequantize
    ):
        return weight.dequantize()
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight
    return _asked(module)


def bias_of(module: nn.Module) -> Tensor | None:
    """What a module adds; None if it adds nothing."""
    bias: Any = held(module, "bias")
    return cast(Any, bias)() if callable(bias) else bias


def stacked_of(attention: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and bias [3 d_model, ...] of the queries, keys and values of an `nn.MultiheadAttention`."""
    inner = getattr(attention, "base_layer", attention)
    weight, bias = held(inner, "in_proj_weight"), held(inner, "in_proj_bias")
    return (weight if inner is attention else _adapted(attention, weight, "lora_A")), bias


def out_of(attention: Any) -> nn.Module:
    """The output projection of an `nn.MultiheadAttention`.

    Raises: ModelStateError under an adapter that is active and not merged.
    """
    inner = getattr(attention, "base_layer", attention)
    if inner is not attention and not (attention.merged or attention.disable_adapters):
        # peft 0.21.2 merges it in each forward, and adds what the adapter adds twice.
        raise ModelStateError(
            f"{type(attention).__name__} merges the adapter of its output projection in its own forward, so "
            "its weight is known only when it is merged for good. Merge it: merge_and_unload(). Its sites "
            "can be read."
        )
    return inner.out_proj


def _asked(module: nn.Module) -> Tensor:
    """A linear module's weight [out, in], an embedding's [token, width], by asking the module."""
    if isinstance(getattr(module, "base_layer", None), nn.Embedding):
        return _adapted(module, weight_of(module.base_layer), "lora_embedding_A")  # type: ignore[arg-type]
    n_in = getattr(module, "in_features", None)
    if n_in is None:
        weight = getattr(module, "weight", None)
        stored = f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else "no one tensor"
        raise ModelStateError(
            f"{type(module).__name__} stores its weight as {stored}, which is not what it multiplies with. "
            "Read the site's values instead, merge the adapter (merge_and_unload, fuse_lora), or load the "
            "model without quantisation."
        )
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    unit = torch.eye(n_in, device=device, dtype=torch.float32 if first is None else first.dtype)
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False  # An adapter may drop values out.
        # Its own forward, so that no hook on it is called.
        rows = module.forward(unit)
        added = 0 if bias_of(module) is None else module.forward(torch.zeros_like(unit[:1]))
    finally:
        for part, mode in modes:
            part.training = mode
    return (rows - added).T


def _adapted(layer: Any, weight: Tensor, kept_in: str) -> Tensor:
    """A weight with what the active adapters of its layer add; merged ones are in it."""
    if layer.disable_adapters or layer.merged:
        return weight
    active = [name for name in layer.active_adapters if name in getattr(layer, kept_in)]
    return weight + sum(layer.get_delta_weight(name) for name in active)
