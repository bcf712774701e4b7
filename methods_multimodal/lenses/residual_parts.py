"""What each part of a tower wrote to the residual stream at one position, along given directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mm_adapters import Read, TowerView


@dataclass(frozen=True)
class ResidualWrites:
    """What was written to the residual stream at one position, by each part; the stream is their sum.

    Where a block normalises what its attention gives, `z` and `attn_scale` are over that norm's scale.
    """

    embed: Float[Tensor, "row d_model"]
    z: Float[Tensor, "row layer head d_head"]
    attn_bias: Float[Tensor, "layer d_model"]
    attn_scale: Float[Tensor, "row layer"]
    mlps: Float[Tensor, "row layer d_model"]
    w_o: Float[Tensor, "layer head d_head d_model"]
    scale: Float[Tensor, "row 1"]
    normalized: Float[Tensor, "row d_model"]


@dataclass(frozen=True)
class Projections:
    """What each part adds to each target."""

    embed: Float[Tensor, "row target"]
    heads: Float[Tensor, "row target layer head"]
    attn_bias: Float[Tensor, "row target layer"]
    mlps: Float[Tensor, "row target layer"]


def needed_sites(tower: TowerView) -> list[str]:
    """The sites that `writes` needs. Raises: MissingSiteError if the tower has no one residual stream."""
    tower.check_one_stream()
    layers = range(max(1, tower.n_layers()))  # A tower without blocks lacks those of the first.
    names = [f"{tower.name}.blocks.0.hook_resid_pre"]
    names += [f"{tower.name}.blocks.{i}.{part}" for i in layers for part in ("attn.hook_z", "hook_mlp_out")]
    names += [_post_norm_site(tower, i) for i in range(tower.n_layers()) if _post_norm(tower, i)]
    return [*names, f"{tower.name}.ln_final.hook_scale", f"{tower.name}.ln_final.hook_normalized"]


def reads(tower: TowerView, at: Callable[[Tensor], Tensor]) -> list[Read]:
    """The reads that `writes` needs; of each site only the position that `at` takes is kept."""
    return [Read(name, reduce=at) for name in needed_sites(tower)]


def writes(values: Mapping[str, Tensor], tower: TowerView) -> ResidualWrites:
    """What was written, from the values of `reads` and the tower's weights."""
    name, layers = tower.name, range(tower.n_layers())
    attention = [tower.weights(i).names("attn") for i in layers]
    z = torch.stack([values[f"{name}.blocks.{i}.attn.hook_z"].float() for i in layers], 1)
    w_o = torch.stack([one["W_O"]() for one in attention]).detach().float()
    attn_bias = torch.stack([one["b_O"]() for one in attention]).detach().float()
    attn_scale = z.new_ones(z.shape[:2])
    for i in layers:
        if weights := _post_norm(tower, i):
            gain = weights["w"]().detach().float()
            w_o[i], attn_bias[i] = w_o[i] * gain, attn_bias[i] * gain
            attn_scale[:, i] = 1 / values[_post_norm_site(tower, i)].float()[:, 0]
            z[:, i] = z[:, i] * rearrange(attn_scale[:, i], "row -> row 1 1")
    return ResidualWrites(
        embed=values[f"{name}.blocks.0.hook_resid_pre"].float(),
        z=z,
        attn_bias=attn_bias,
        attn_scale=attn_scale,
        mlps=torch.stack([values[f"{name}.blocks.{i}.hook_mlp_out"].float() for i in layers], 1),
        w_o=w_o,
        scale=values[f"{name}.ln_final.hook_scale"].float(),
        normalized=values[f"{name}.ln_final.hook_normalized"].float(),
    )


def project(
    parts: ResidualWrites,
    directions: Float[Tensor, "d_model target"],
    factor: Float[Tensor, "row 1"],
    *,
    centred: bool,
) -> Projections:
    """What each part adds along each direction, times `factor`, after the final norm's division.

    `centred`: the norm is a LayerNorm. It takes the mean off every part; taking it off the
    direction instead is the same number.
    """
    if centred:
        directions = directions - directions.mean(0)
    factor = factor / parts.scale
    wide = rearrange(factor, "row 1 -> row 1 1")
    readers = einsum(parts.w_o, directions, "layer head d m, m target -> layer head d target")
    bias = einsum(parts.attn_bias, directions, "layer m, m target -> target layer")
    return Projections(
        embed=parts.embed @ directions * factor,
        heads=einsum(parts.z, readers, "row layer head d, layer head d target -> row target layer head")
        * rearrange(factor, "row 1 -> row 1 1 1"),
        attn_bias=bias[None] * rearrange(parts.attn_scale, "row layer -> row 1 layer") * wide,
        mlps=einsum(parts.mlps, directions, "row layer m, m target -> row target layer") * wide,
    )


def _post_norm(tower: TowerView, layer: int) -> dict[str, Callable[[], Tensor]]:
    """The weights of the RMS norm that the attention's output goes through before it joins the stream."""
    return tower.weights(layer).names("ln1_post")


def _post_norm_site(tower: TowerView, layer: int) -> str:
    return f"{tower.name}.blocks.{layer}.ln1_post.hook_scale"
