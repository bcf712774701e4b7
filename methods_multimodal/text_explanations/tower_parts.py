"""What a tower's summary is made of, in weights: how each part's output reaches it, linearly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.model import check_pool, check_sites, check_summary
from mm_adapters import Model, TowerView

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
    view.check_one_stream()
    check_sites(model, [f"{tower}.blocks.0.{part}" for part in NEEDED] + [f"{tower}.ln_final.hook_scale"])
    check_pool(view, "first", "last", "end", "attention")
    if view.pool == "attention":
        check_sites(model, [f"{tower}.pool.attn.hook_pattern", f"{tower}.pool.hook_mlp_out"])
    check_summary(model, view)
    norm = view.final_norm
    assert norm is not None
    blocks = [view.weights(i).names("attn") for i in range(view.n_layers())]
    out = torch.stack([b["W_O"]().detach().float() for b in blocks])
    out_bias = torch.stack([b["b_O"]().detach().float() for b in blocks])
    beta = norm.bias.detach().float().expand(out.shape[-1])
    gamma = norm.gain.detach().float().expand(out.shape[-1])
    matrices, pool_bias = _summary_weights(view, out.shape[-1])
    uncentred = gamma[None, :, None] * matrices
    # Taking the mean off the reader takes it off whatever is read.
    readers = uncentred - uncentred.mean(1, keepdim=True) if norm.kind == "LN" else uncentred
    offset = einsum(beta, matrices, "m, g m w -> w") + pool_bias
    return TowerParts(view, out, out_bias, readers, offset, uncentred)


def _summary_weights(
    tower: TowerView, width: int
) -> tuple[Float[Tensor, "pool d_model width"], Float[Tensor, " width"]]:
    """What takes the normalised stream to the summary, and the summary's own bias."""
    if tower.pool == "attention":
        return _pooling_weights(tower)
    matrix, bias = tower.projection, tower.projection_bias
    if matrix is None:
        return torch.eye(width, device=tower.device)[None], torch.zeros(width, device=tower.device)
    matrix = matrix.detach().float()
    return matrix[None], matrix.new_zeros(matrix.shape[1]) if bias is None else bias.detach().float()


def _pooling_weights(
    tower: TowerView,
) -> tuple[Float[Tensor, "pool d_model width"], Float[Tensor, " width"]]:
    """Of each head that pools, what its values make of the stream; and the bias of all."""
    weights = {name: get().detach().float() for name, get in tower.pool_weights.names("pool.attn").items()}
    # Attention weights sum to one, so the values' bias arrives whole.
    bias = einsum(weights["b_V"], weights["W_O"], "g d, g d w -> w") + weights["b_O"]
    return weights["W_V"] @ weights["W_O"], bias
