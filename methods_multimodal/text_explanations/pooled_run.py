"""One run of a tower, reduced on the fly to the position (or positions) that its summary is read from.

Every value has a `pool` axis: one entry where the summary is one position's, one for each pooling
head where it is read from all. What is pooled is divided by the final norm's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.model import model_summary
from methods_multimodal.text_explanations.tower_parts import TowerParts
from mm_adapters import InputError, Model, Read, Run

Pooling = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PooledRun:
    """What each part wrote, over the norm's scale.

    `z` is None if tokens are kept, and `patterns` and `values` are None if they are not. `mass` is what a
    constant added at every position comes to, `mean` the pooled stream's own mean, and `embedding` the
    model's own summary.
    """

    embed: Float[Tensor, "row pool d_model"]
    mlps: Float[Tensor, "row layer pool d_model"]
    z: Float[Tensor, "row layer pool head d_head"] | None
    patterns: Float[Tensor, "row layer pool head token"] | None
    values: Float[Tensor, "row layer token head d_head"] | None
    mass: Float[Tensor, "row pool"]
    mean: Float[Tensor, "row pool"]
    pool_mlp: Float[Tensor, "row width"] | None
    embedding: Float[Tensor, "row width"]


def run_pooled(model: Model, parts: TowerParts, inputs: Mapping[str, Any], *, tokens: bool) -> PooledRun:
    """Runs the tower once (twice, where the position is not known beforehand) and pools what it wrote."""
    _check_pixels(parts, inputs)
    position = {"first": 0, "last": -1}.get(parts.pool)
    if position is None:
        weights = _position_weights(model, parts, inputs)

        def pool(x: Tensor) -> Tensor:
            return einsum(weights, x.float(), "b g n, b n ... -> b g ...")

        def pool_rows(pattern: Tensor) -> Tensor:
            return einsum(weights, pattern.float(), "b g q, b h q k -> b g h k")
    else:

        def pool(x: Tensor) -> Tensor:
            return x[:, position].float().unsqueeze(1)

        def pool_rows(pattern: Tensor) -> Tensor:
            return pattern[:, :, position].float().unsqueeze(1)

    run = model.run(inputs, read=_reads(parts, pool, pool_rows, tokens))
    scale = run[parts.site("ln_final.hook_scale")].float()
    if position is None:
        inverse_scale, mass = torch.ones_like(weights[:, :, 0]), weights.sum(-1)
    else:
        mass = inverse_scale = 1 / scale[:, position]
    return _pooled(parts, run, inverse_scale, mass, tokens)


def _check_pixels(parts: TowerParts, inputs: Mapping[str, Any]) -> None:
    pixels = inputs[parts.tower.input_name]
    if parts.tower.record.patch is not None and pixels.ndim != 4:
        raise InputError(
            f"The {parts.name} tower by itself takes pixels [image, channel, height, width]; these are "
            f"{tuple(pixels.shape)}. Give the tiles of all images one after the other."
        )


def _reads(parts: TowerParts, pool: Pooling, pool_rows: Pooling, tokens: bool) -> list[Read]:
    reads = [Read(parts.site("hook_resid_pre", 0), pool)]
    for layer in range(parts.n_layers):
        if tokens:
            reads.append(Read(parts.site("attn.hook_pattern", layer), pool_rows))
            reads.append(Read(parts.site("attn.hook_v", layer), Tensor.float))
        else:
            reads.append(Read(parts.site("attn.hook_z", layer), pool))
        reads.append(Read(parts.site("hook_mlp_out", layer), pool))
    last = parts.site("hook_resid_post", parts.n_layers - 1)
    reads.append(Read(last, lambda x: pool(x.float().mean(-1, keepdim=True))))
    reads.append(Read(parts.site("ln_final.hook_scale")))
    if parts.pool == "attention":
        reads.append(Read(parts.site("pool.hook_mlp_out")))
    return reads


def _pooled(parts: TowerParts, run: Run, inverse_scale: Tensor, mass: Tensor, tokens: bool) -> PooledRun:
    layers = range(parts.n_layers)

    def stacked(part: str) -> Tensor:
        return torch.stack([run[parts.site(part, i)] for i in layers], 1)

    z = patterns = values = None
    if tokens:
        patterns = stacked("attn.hook_pattern") * rearrange(inverse_scale, "b g -> b 1 g 1 1")
        values = stacked("attn.hook_v")
        if values.shape[-2] != parts.n_heads:  # Grouped: several heads read one group's values.
            values = repeat(values, "b l n h d -> b l n (h q) d", q=parts.n_heads // values.shape[-2])
    else:
        z = stacked("attn.hook_z") * rearrange(inverse_scale, "b g -> b 1 g 1 1")
    last = parts.site("hook_resid_post", parts.n_layers - 1)
    pool_mlp = run[parts.site("pool.hook_mlp_out")][:, 0].float() if parts.pool == "attention" else None
    return PooledRun(
        embed=run[parts.site("hook_resid_pre", 0)] * inverse_scale.unsqueeze(-1),
        mlps=stacked("hook_mlp_out") * rearrange(inverse_scale, "b g -> b 1 g 1"),
        z=z,
        patterns=patterns,
        values=values,
        mass=mass,
        mean=run[last][..., 0] * inverse_scale,
        pool_mlp=pool_mlp,
        embedding=model_summary(parts.tower, run.output),
    )


def _position_weights(
    model: Model, parts: TowerParts, inputs: Mapping[str, Any]
) -> Float[Tensor, "row pool pos"]:
    """How much of each position the summary reads, over the norm's scale there."""
    scale_site, normal_site = parts.site("ln_final.hook_scale"), parts.site("ln_final.hook_normalized")
    if parts.pool == "attention":
        pattern_site = parts.site("pool.attn.hook_pattern")
        run = model.run(inputs, read=[scale_site, pattern_site])
        return run[pattern_site][:, :, 0].float() / run[scale_site][..., 0].float().unsqueeze(1)
    run = model.run(inputs, read=[scale_site, normal_site])
    # The tokenizer decides where the end token is: it is the position that gives the model's own summary.
    summaries = run[normal_site].float() @ parts.uncentred[0] + parts.offset
    own = model_summary(parts.tower, run.output)
    nearest = (summaries - own.unsqueeze(1)).square().sum(-1).argmin(-1)
    selected = torch.nn.functional.one_hot(nearest, summaries.shape[1]).float()
    return (selected / run[scale_site][..., 0].float()).unsqueeze(1)
