"""What a tower's summary is made of, in weights: how each part's output reaches it, linearly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mm_adapters import MissingSiteError, Model, TowerView

NEEDED = ("hook_resid_pre", "attn.hook_v", "attn.hook_pattern", "attn.hook_z", "hook_mlp_out")


@dataclass(frozen=True)
class TowerParts:
    """A tower's weights as the decomposition needs them, in float32.

    `out[layer]` and `out_bias[layer]` are the attention's. `readers` take a residual, divided by the
    final norm's scale, to the summary: one matrix if the summary is one position's, one for each
    head that pools. They take the mean off, where the norm does; `uncentred` do not. `offset` is
    what the norm's bias and the summary's own add.
    """

    tower: TowerView
    out: Float[Tensor, "layer head d_head d_model"]
    out_bias: Float[Tensor, "layer d_model"]
    readers: Float[Tensor, "pool d_model width"]
    offset: Float[Tensor, " width"]
    uncentred: Float[Tensor, "pool d_model width"]

    @property
    def name(self) -> str:
        return self.tower.name

    @property
    def pool(self) -> str:
        """Which position the summary is read from; "attention" if it is read from all."""
        return str(self.tower.pool)

    @property
    def n_layers(self) -> int:
        return self.out.shape[0]

    @property
    def n_heads(self) -> int:
        return self.out.shape[1]

    @property
    def width(self) -> int:
        return self.readers.shape[-1]

    def site(self, part: str, layer: int | None = None) -> str:
        """A site of this tower."""
        return f"{self.name}.{part}" if layer is None else f"{self.name}.blocks.{layer}.{part}"

    def head_readers(self, layer: int) -> Float[Tensor, "pool head d_head width"]:
        """What takes a head's z to the summary."""
        return einsum(self.out[layer], self.readers, "h d m, g m w -> g h d w")


def tower_parts(model: Model, tower: str = "vision") -> TowerParts:
    """The parts of one tower of `model`.

    Raises: MissingSiteError if the tower has no blocks of attention and MLP that add to one stream,
    or gives no summary that is linear in that stream.
    """
    view = model.check_tower(tower)
    if view.pool not in ("first", "last", "end", "attention"):
        raise MissingSiteError(f"{tower}: its summary is pooled by {view.pool}, which is not split here.")
    present = {site.part for site in model.sites(f"{tower}.blocks.0.*") if site.reason is None}
    lacking = [part for part in NEEDED if part not in present]
    if lacking:
        raise MissingSiteError(
            f"{tower}: a decomposition needs blocks that add attention and an MLP to one stream; "
            f"{model.name} has no {tower}.blocks.0.{lacking[0]}."
        )
    norm = view.final_norm
    if norm is None:
        raise MissingSiteError(f"{tower}: it has no final norm to divide by, so no decomposition here.")
    blocks = [view.weights(i).names("attn") for i in range(view.n_layers())]
    out = torch.stack([b["W_O"]().detach().float() for b in blocks])
    out_bias = torch.stack([b["b_O"]().detach().float() for b in blocks])
    beta = norm.bias.detach().float().expand(out.shape[-1])
    gamma = norm.gain.detach().float().expand(out.shape[-1])
    matrices, pool_bias = _summary_weights(model, view, out.shape[-1])
    uncentred = gamma[None, :, None] * matrices
    # Taking the mean off the reader takes it off whatever is read.
    readers = uncentred - uncentred.mean(1, keepdim=True) if norm.kind == "LN" else uncentred
    offset = einsum(beta, matrices, "m, g m w -> w") + pool_bias
    return TowerParts(view, out, out_bias, readers, offset, uncentred)


def _summary_weights(
    model: Model, tower: TowerView, width: int
) -> tuple[Float[Tensor, "pool d_model width"], Float[Tensor, " width"]]:
    """What takes the normalised stream to the summary, and the summary's own bias."""
    if tower.pool == "attention":
        return _pooling_weights(model, tower)
    matrix, bias = tower.projection, tower.projection_bias
    if matrix is None:
        return torch.eye(width, device=tower.device)[None], torch.zeros(width, device=tower.device)
    matrix = matrix.detach().float()
    return matrix[None], matrix.new_zeros(matrix.shape[1]) if bias is None else bias.detach().float()


def _pooling_weights(
    model: Model, tower: TowerView
) -> tuple[Float[Tensor, "pool d_model width"], Float[Tensor, " width"]]:
    sites = model.sites(f"{tower.name}.pool.attn.hook_pattern")
    if not sites or sites[0].reason is not None:
        raise MissingSiteError(
            f"{tower.name}: its summary is pooled by attention, and no site shows that attention."
        )
    module: Any = model.wrapped.get_submodule(sites[0].module)
    weight, bias = module.in_proj_weight.detach().float(), module.in_proj_bias.detach().float()
    n_heads = module.num_heads
    value = rearrange(weight.chunk(3)[2], "(g d) m -> g m d", g=n_heads)
    value_bias = rearrange(bias.chunk(3)[2], "(g d) -> g d", g=n_heads)
    out = rearrange(module.out_proj.weight.detach().float(), "w (g d) -> g d w", g=n_heads)
    # Attention weights sum to one, so the values' bias arrives whole.
    own = einsum(value_bias, out, "g d, g d w -> w") + module.out_proj.bias.detach().float()
    return value @ out, own
