"""The model's weights in TransformerLens' layout, found through the sites they make or read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mm_adapters.records.resolve import head_count
from mm_adapters.records.spec import Attention, Input, Location, Norm, Output
from mm_adapters.sites.held import held
from mm_adapters.sites.linear_map import bias_of, out_of, stacked_of, weight_of

_QKV = {"Q": "hook_q", "K": "hook_k", "V": "hook_v"}


@dataclass(frozen=True)
class BlockWeights:
    """One repeated module's weights by TransformerLens' names: ("attn", "W_Q"), ("ln1", "w"), ..."""

    block: nn.Module
    locations: dict[str, Location]

    def names(self, part: str) -> dict[str, Callable[[], Tensor]]:
        """What `part` ("attn", "cross_attn", "mlp", "ln1", ...) has, each as a function."""
        locations = self.locations
        getters: dict[str, Callable[[], Tensor]] = {}
        if f"{part}.hook_z" in locations:
            sites = {letter: f"{part}.{_QKV.get(letter, 'hook_z')}" for letter in "QKVO"}
            for letter in (w for w, site in sites.items() if self._has_weight(locations.get(site))):
                getters[f"W_{letter}"] = lambda w=letter: self._attention(part, w)[0]
                getters[f"b_{letter}"] = lambda w=letter: self._attention(part, w)[1]
        elif f"{part}.hook_post" in locations:
            up = "hook_pre_linear" if f"{part}.hook_pre_linear" in locations else "hook_pre"
            linears = {"in": f"{part}.{up}", "out": f"{part}.hook_post"}
            if up == "hook_pre_linear":
                linears["gate"] = f"{part}.hook_pre"
            for name, site in linears.items():
                getters[f"W_{name}"] = lambda s=site: self._linear(s)[0].T
                getters[f"b_{name}"] = lambda s=site: self._linear(s)[1]
        elif isinstance(location := locations.get(f"{part}.hook_scale"), Norm):
            getters["w"] = lambda: norm_weight(self.block.get_submodule(location.path), location.offset)
            getters["b"] = lambda: norm_bias(self.block.get_submodule(location.path))
        return getters

    def _attention(self, part: str, letter: str) -> tuple[Tensor, Tensor]:
        locations = self.locations
        n_heads = self._heads(locations[f"{part}.hook_q"])
        if letter == "O":
            weight, bias = self._linear(f"{part}.hook_z", branch=f"hook_{part}_out")
            return rearrange(weight, "m (h d) -> h d m", h=n_heads), bias
        site = f"{part}.{_QKV[letter]}"
        weight, bias = self._linear(site)
        n_kv_heads = self._heads(locations[site])
        weight = rearrange(weight, "(h d) m -> h m d", h=n_kv_heads)
        bias = rearrange(bias, "(h d) -> h d", h=n_kv_heads)
        if n_kv_heads != n_heads:  # Grouped queries: TransformerLens shows each head its group's weights.
            weight = repeat(weight, "h m d -> (h g) m d", g=n_heads // n_kv_heads)
            bias = repeat(bias, "h d -> (h g) d", g=n_heads // n_kv_heads)
        return weight, bias

    def _linear(self, site: str, branch: str | None = None) -> tuple[Tensor, Tensor]:
        location = self.locations[site]
        weight, bias = _affine(self.block, location)
        if bias is None:
            bias = weight.new_zeros(weight.shape[0])
        gain = self._gain(branch or ("hook_mlp_out" if site == "mlp.hook_post" else None))
        return (weight, bias) if gain is None else (weight * gain[:, None], bias * gain)

    def _gain(self, branch: str | None) -> Tensor | None:
        """The per-channel gain some models put on a branch before it joins the stream."""
        location = self.locations.get(branch or "")
        if not isinstance(location, Output):
            return None
        if location.gain is not None:
            gain = held(self.block, location.gain.removesuffix(".tanh"))
            if not isinstance(gain, Tensor):  # Built without one, it may be the number 1.
                return None
            return gain.tanh() if location.gain.endswith(".tanh") else gain
        module = self.block.get_submodule(location.path)
        return next((g for n in ("gamma", "lambda1") if (g := held(module, n)) is not None), None)

    def _has_weight(self, location: Location | None) -> bool:
        # What a module attends with may have come out of several projections and a rotation.
        if isinstance(location, Attention):
            return getattr(self.block.get_submodule(location.path), "in_proj_weight", None) is not None
        return location is not None

    def _heads(self, location: Location) -> int:
        assert isinstance(location, Output | Input | Attention)
        assert location.heads is not None
        return head_count(self.block, location.heads)


def norm_weight(norm: nn.Module, offset: float = 0.0) -> Tensor:
    """A norm's gain; ones if it has none."""
    if getattr(norm, "weight", None) is None:
        return torch.ones(1)
    weight = weight_of(norm)
    return weight + offset if offset else weight


def norm_bias(norm: nn.Module) -> Tensor:
    """A norm's offset; zeros if it has none."""
    bias = bias_of(norm)
    return torch.zeros_like(norm_weight(norm)) if bias is None else bias


def tensor_at(root: object, path: str) -> Tensor | None:
    """The tensor at a dotted path, transposed if the path ends in ".T"; None if it is not there.

    Of several paths with "|" between them it is that of the first where there is one.
    """
    if "|" in path:
        tensors = (tensor_at(root, one) for one in path.split("|"))
        return next((tensor for tensor in tensors if tensor is not None), None)
    value: Any = root
    for name in path.removesuffix(".T").split("."):
        if name == "weight" and isinstance(value, nn.Module) and hasattr(value, name):
            value = weight_of(value)
        else:
            value = held(value, name) if isinstance(value, nn.Module) else getattr(value, name, None)
    if isinstance(value, nn.Module) and (isinstance(value, nn.Linear) or hasattr(value, "base_layer")):
        value = weight_of(value).T
    if not isinstance(value, Tensor):
        return None
    return value.T if path.endswith(".T") else value


def _affine(block: nn.Module, location: Location) -> tuple[Tensor, Tensor | None]:
    assert isinstance(location, Output | Input | Attention)
    module = block.get_submodule(location.path)
    if isinstance(location, Attention):  # nn.MultiheadAttention
        if location.value == "z":
            return weight_of(out_of(module)), bias_of(out_of(module))
        which = "qkv".index(location.value)
        stacked, added = stacked_of(module)
        return stacked.chunk(3)[which], None if added is None else added.chunk(3)[which]
    weight, bias = weight_of(module), bias_of(module)
    if location.chunk and isinstance(location, Output):
        count, which = location.chunk
        return weight.chunk(count)[which], None if bias is None else bias.chunk(count)[which]
    return weight, bias
