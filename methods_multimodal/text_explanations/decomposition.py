"""An embedding as the exact sum of what every head, token and MLP of its tower put into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.batches import batches
from methods_multimodal.core.model import check_one
from methods_multimodal.core.record import Record
from methods_multimodal.text_explanations.pooled_run import PooledRun, folded
from methods_multimodal.text_explanations.tower_parts import TowerParts, tower_parts
from mm_adapters import InputError, Model

Shares = Literal["exact", "uniform"]


@dataclass(frozen=True)
class Decomposition(Record):
    """What each component adds to each embedding; together they are the embedding.

    `heads` has one entry on its token axis if the tokens were summed, else one for each position
    that was attended to. `mlps` starts with what enters the first block. `bias` is what no
    component computes from the image: the attentions' output biases, the final norm's bias and the
    summary's own. `pool` is what the MLP of an attention pooling adds (zeros elsewhere). `own` is the
    model's embedding. `width` is the joint space's, or one entry for each direction of `onto`.
    """

    heads: Float[Tensor, "image layer token head width"]
    mlps: Float[Tensor, "image part width"]
    bias: Float[Tensor, "image width"]
    pool: Float[Tensor, "image width"]
    own: Float[Tensor, "image width"]
    length: Float[Tensor, " image"]
    grid: tuple[int, int] | None
    shares: Shares

    @property
    def total(self) -> Float[Tensor, "image width"]:
        """The sum of all components."""
        return self.heads.sum((1, 2, 3)) + self.mlps.sum(1) + self.bias + self.pool

    def check(self) -> float:
        """The largest distance of `total` from the model's own embedding, relative to its length."""
        gap = (self.total - self.own).norm(dim=-1) / self.own.norm(dim=-1).clamp_min(1e-30)
        return float(gap.max())

    def unit(self) -> Decomposition:
        """The decomposition of the embeddings divided by their lengths."""
        values = {
            f.name: value / self.length.reshape(-1, *[1] * (value.ndim - 1))
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **values)

    def summed(self) -> Decomposition:
        """The same with the tokens summed."""
        return replace(self, heads=self.heads.sum(2, keepdim=True))


def decompose(
    model: Model,
    *,
    images: Any = None,
    texts: Any = None,
    tower: str | None = None,
    tokens: Literal["keep", "sum"] = "keep",
    shares: Shares = "exact",
    onto: Float[Tensor, "direction width"] | None = None,
    batch_size: int = 16,
) -> Decomposition:
    """Splits embeddings into the direct effects of all components of their tower.

    Each head's output at the position that is read, split by the position it came from, each MLP's
    output and the embedding go through the final norm, whose division is the model's own, and into
    the joint space. For a tower that pools by attention they go through that attention too. The sum
    is the model's un-normalised embedding, without approximation; `check()` says how closely.

    `images` are prepared pixels [image, channel, height, width], or pictures, paths, or any iterable
    of these; `texts` strings, or prepared arguments of the text tower. `onto`: directions, such as
    those of a zero-shot classifier; what is kept is then only each component's part along them.
    `shares`: with "exact" each component is centred by itself, and biases are a component of their
    own; "uniform" gives every term an equal share of mean and biases, as published.

    Source: Gandelsman et al. 2024, arXiv 2310.05916, section 3 and appendix (uniform shares).
    Raises: MissingSiteError if the tower's summary is not linear in one stream of attention and MLPs.
    """
    options: dict[str, Any] = {"tower": tower, "tokens": tokens, "shares": shares, "onto": onto}
    made = list(decompositions(model, images=images, texts=texts, batch_size=batch_size, **options))
    if not made:
        raise InputError("There is nothing to decompose: no image or text was given.")
    first = made[0]
    tensors = [f.name for f in fields(first) if isinstance(getattr(first, f.name), Tensor)]
    return replace(first, **{name: torch.cat([getattr(d, name) for d in made]) for name in tensors})


def decompositions(
    model: Model,
    *,
    images: Any = None,
    texts: Any = None,
    tower: str | None = None,
    tokens: Literal["keep", "sum"] = "keep",
    shares: Shares = "exact",
    onto: Float[Tensor, "direction width"] | None = None,
    batch_size: int = 16,
) -> Iterator[Decomposition]:
    """`decompose`, one batch at a time: for more images than fit in memory."""
    tower = tower or check_one(images, texts)
    if shares not in ("exact", "uniform"):
        raise InputError(f"There are no {shares!r} shares; there are 'exact' and 'uniform'.")
    parts = tower_parts(model, tower)
    if shares == "uniform" and parts.pool == "attention":
        raise InputError(
            "Uniform shares are defined for a summary of one position; this tower pools by attention."
        )
    if onto is not None and onto.shape[-1] != parts.width:
        raise InputError(
            f"`onto` has directions of width {onto.shape[-1]}; the embedding's is {parts.width}."
        )
    for inputs in batches(model, parts.tower, images if texts is None else texts, batch_size):
        yield split(parts, folded(model, parts, inputs, tokens=tokens == "keep"), shares, onto,
                    _grid(parts, inputs))  # fmt: skip


def split(
    parts: TowerParts,
    seen: PooledRun,
    shares: Shares = "exact",
    onto: Float[Tensor, "direction width"] | None = None,
    grid: tuple[int, int] | None = None,
) -> Decomposition:
    """The decomposition of one folded run."""
    read, offset, own, pool = parts.readers, parts.offset, seen.own, seen.pool_mlp
    plain = parts.uncentred
    length = own.norm(dim=-1)
    if onto is not None:
        directions = onto.to(read).T
        read, offset, own, plain = (
            read @ directions,
            offset @ directions,
            own @ directions,
            plain @ directions,
        )
        pool = None if pool is None else pool @ directions
    reader = read if shares == "exact" else plain
    heads = _heads(parts, seen, reader)
    parts_of_stream = torch.cat([seen.embed.unsqueeze(1), seen.mlps], 1)
    mlps = einsum(parts_of_stream, reader, "b l g m, g m w -> b l w")
    biases = einsum(seen.mass, parts.out_bias, reader, "b g, l m, g m w -> b l w")
    if shares == "exact":
        bias = biases.sum(1) + offset
    else:
        heads, mlps = _uniform(parts, seen, heads, mlps, biases, plain, offset)
        bias = torch.zeros_like(own)
    return Decomposition(
        heads=heads,
        mlps=mlps,
        bias=bias,
        pool=torch.zeros_like(own) if pool is None else pool,
        own=own,
        length=length,
        grid=grid,
        shares=shares,
    )


def _heads(
    parts: TowerParts, seen: PooledRun, reader: Float[Tensor, "pool d_model width"]
) -> Float[Tensor, "image layer token head width"]:
    made = []
    for layer in range(parts.n_layers):
        # One small matrix for each head; nothing is as wide as the stream for every token.
        each = einsum(parts.out[layer], reader, "h d m, g m w -> g h d w")
        if seen.z is not None:
            made.append(einsum(seen.z[:, layer], each, "b g h d, g h d w -> b h w").unsqueeze(1))
            continue
        assert seen.patterns is not None
        assert seen.values is not None
        weighted = einsum(seen.patterns[:, layer], seen.values[:, layer], "b g h n, b n h d -> h b n g d")
        flat = rearrange(weighted, "h b n g d -> h (b n) (g d)")
        out = torch.bmm(flat, rearrange(each, "g h d w -> h (g d) w"))
        made.append(rearrange(out, "h (b n) w -> b n h w", b=weighted.shape[1]))
    return torch.stack(made, 1)


def _uniform(
    parts: TowerParts,
    seen: PooledRun,
    heads: Tensor,
    mlps: Tensor,
    biases: Tensor,
    plain: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor]:
    n_terms = 2 * parts.n_layers + 1
    cells = heads.shape[2] * heads.shape[3]
    mean = einsum(seen.mean, plain, "b g, g m w -> b w")
    own_share = (offset - mean) / n_terms
    shared = (biases + own_share.unsqueeze(1)) / cells
    return heads + rearrange(shared, "b l w -> b l 1 1 w"), mlps + own_share.unsqueeze(1)


def _grid(parts: TowerParts, inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    record = parts.tower.record
    if record.role != "vision" or record.patch is None:
        return None
    return parts.tower.patch_layout(inputs[parts.tower.input_name]).grid
