"""One run of a tower, folded on the fly to the position (or positions) that its summary is read from.

Every value has a `pool` axis: one entry where the summary is one position's, one for each pooling
head where it is read from all. What is folded is divided by the final norm's scale.
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
from mm_adapters import Model, Read, Run

Fold = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PooledRun:
    """What each part wrote, over the norm's scale. `values` and `patterns` only if tokens are kept.

    `mass` is what a constant added at every position comes to; `mean` the folded stream's own mean.
    """

    embed: Float[Tensor, "row pool d_model"]
    mlps: Float[Tensor, "row layer pool d_model"]
    z: Float[Tensor, "row layer pool head d_head"] | None
    patterns: Float[Tensor, "row layer pool head token"] | None
    values: Float[Tensor, "row layer token head d_head"] | None
    mass: Float[Tensor, "row pool"]
    mean: Float[Tensor, "row pool"]
    pool_mlp: Float[Tensor, "row width"] | None
    own: Float[Tensor, "row width"]


def folded(model: Model, parts: TowerParts, inputs: Mapping[str, Any], *, tokens: bool) -> PooledRun:
    """Runs the tower once (twice, where the position is not known beforehand) and folds what it did."""
    position = {"first": 0, "last": -1}.get(parts.pool)
    if position is None:
        weights = _found_weights(model, parts, inputs)

        def fold(x: Tensor) -> Tensor:
            return einsum(weights, x.float(), "b g n, b n ... -> b g ...")

        def fold_rows(pattern: Tensor) -> Tensor:
            return einsum(weights, pattern.float(), "b g q, b h q k -> b g h k")
    else:

        def fold(x: Tensor) -> Tensor:
            return x[:, position].float().unsqueeze(1)

        def fold_rows(pattern: Tensor) -> Tensor:
            return pattern[:, :, position].float().unsqueeze(1)

    run = model.run(inputs, read=_reads(parts, fold, fold_rows, tokens))
    scale = run[parts.site("ln_final.hook_scale")].float()
    if position is None:
        over, mass = torch.ones_like(weights[:, :, 0]), weights.sum(-1)
    else:
        mass = over = 1 / scale[:, position]
    return _gathered(parts, run, over, mass, tokens)


def _reads(parts: TowerParts, fold: Fold, fold_rows: Fold, tokens: bool) -> list[Read]:
    reads = [Read(parts.site("hook_resid_pre", 0), fold)]
    for layer in range(parts.n_layers):
        if tokens:
            reads.append(Read(parts.site("attn.hook_pattern", layer), fold_rows))
            reads.append(Read(parts.site("attn.hook_v", layer), Tensor.float))
        else:
            reads.append(Read(parts.site("attn.hook_z", layer), fold))
        reads.append(Read(parts.site("hook_mlp_out", layer), fold))
    last = parts.site("hook_resid_post", parts.n_layers - 1)
    reads.append(Read(last, lambda x: fold(x.float().mean(-1, keepdim=True))))
    reads.append(Read(parts.site("ln_final.hook_scale")))
    if parts.pool == "attention":
        reads.append(Read(parts.site("pool.hook_mlp_out")))
    return reads


def _gathered(parts: TowerParts, run: Run, over: Tensor, mass: Tensor, tokens: bool) -> PooledRun:
    layers = range(parts.n_layers)

    def stacked(part: str) -> Tensor:
        return torch.stack([run[parts.site(part, i)] for i in layers], 1)

    z = patterns = values = None
    if tokens:
        patterns = stacked("attn.hook_pattern") * rearrange(over, "b g -> b 1 g 1 1")
        values = stacked("attn.hook_v")
        if values.shape[-2] != parts.n_heads:  # Grouped: several heads read one group's values.
            values = repeat(values, "b l n h d -> b l n (h q) d", q=parts.n_heads // values.shape[-2])
    else:
        z = stacked("attn.hook_z") * rearrange(over, "b g -> b 1 g 1 1")
    last = parts.site("hook_resid_post", parts.n_layers - 1)
    pool_mlp = run[parts.site("pool.hook_mlp_out")][:, 0].float() if parts.pool == "attention" else None
    return PooledRun(
        embed=run[parts.site("hook_resid_pre", 0)] * over.unsqueeze(-1),
        mlps=stacked("hook_mlp_out") * rearrange(over, "b g -> b 1 g 1"),
        z=z,
        patterns=patterns,
        values=values,
        mass=mass,
        mean=run[last][..., 0] * over,
        pool_mlp=pool_mlp,
        own=model_summary(parts.tower, run.output),
    )


def _found_weights(
    model: Model, parts: TowerParts, inputs: Mapping[str, Any]
) -> Float[Tensor, "row pool pos"]:
    """How much of each position the summary reads, over the norm's scale there."""
    scale_site, normal_site = parts.site("ln_final.hook_scale"), parts.site("ln_final.hook_normalized")
    if parts.pool == "attention":
        pattern_site = parts.site("pool.attn.hook_pattern")
        run = model.run(inputs, read=[scale_site, pattern_site])
        return run[pattern_site][:, :, 0].float() / run[scale_site][..., 0].float().unsqueeze(1)
    run = model.run(inputs, read=[scale_site, normal_site])
    # The end token's place is the tokenizer's business: here it is where the model's own summary is.
    said = run[normal_site].float() @ parts.uncentred[0] + parts.offset
    own = model_summary(parts.tower, run.output)
    nearest = (said - own.unsqueeze(1)).square().sum(-1).argmin(-1)
    chosen = torch.nn.functional.one_hot(nearest, said.shape[1]).float()
    return (chosen / run[scale_site][..., 0].float()).unsqueeze(1)
