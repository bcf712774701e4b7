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
from methods_multimodal.text_explanations.pooled_run import PooledRun, run_pooled
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

    Args:
        images: Prepared pixels [image, channel, height, width], or pictures, paths, a folder, or any
            iterable of these.
        texts: Strings, or prepared arguments of the text tower. Images or texts, one of the two.
        tower: Which tower they are for: "vision" for images and "text" for texts if it is not said.
        tokens: "keep" splits each head's output by the position it came from, "sum" does not.
        shares: With "exact" each component is centred by itself, and biases are a component of their own;
            "uniform" gives every term an equal share of mean and biases, as published.
        onto: Directions, such as a zero-shot classifier's: only each component's part along them is kept.
        batch_size: Rows of one run.

    Source: Gandelsman et al. 2024, arXiv 2310.05916, section 3 and appendix (uniform shares).
    Raises: MissingSiteError if the tower's summary is not linear in one stream of attention and MLPs.
    """
    options: dict[str, Any] = {"tower": tower, "tokens": tokens, "shares": shares, "onto": onto}
    parts = list(decompositions(model, images=images, texts=texts, batch_size=batch_size, **options))
    if not parts:
        raise InputError("There is nothing to decompose: no image or text was given.")
    first = parts[0]
    tensors = [f.name for f in fields(first) if isinstance(getattr(first, f.name), Tensor)]
    return replace(first, **{name: torch.cat([getattr(part, name) for part in parts]) for name in tensors})


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
    """`decompose`, one batch at a time: for more images than fit in memory. `Args` as there."""
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
        run = run_pooled(model, parts, inputs, tokens=tokens == "keep")
        yield split(parts, run, shares, onto, _grid(parts, inputs))


def split(
    parts: TowerParts,
    run: PooledRun,
    shares: Shares = "exact",
    onto: Float[Tensor, "direction width"] | None = None,
    grid: tuple[int, int] | None = None,
) -> Decomposition:
    """The decomposition of one run's embeddings."""
    centred, offset, own, pool = parts.readers, parts.offset, run.embedding, run.pool_mlp
    plain = parts.uncentred
    length = own.norm(dim=-1)
    if onto is not None:
        directions = onto.to(centred).T
        centred, plain = centred @ directions, plain @ directions
        offset, own = offset @ directions, own @ directions
        pool = None if pool is None else pool @ directions
    reader = centred if shares == "exact" else plain
    heads = _heads(parts, run, reader)
    parts_of_stream = torch.cat([run.embed.unsqueeze(1), run.mlps], 1)
    mlps = einsum(parts_of_stream, reader, "b l g m, g m w -> b l w")
    biases = einsum(run.mass, parts.out_bias, reader, "b g, l m, g m w -> b l w")
    if shares == "exact":
        bias = biases.sum(1) + offset
    else:
        heads, mlps = _uniform(parts, run, heads, mlps, biases, plain, offset)
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
    parts: TowerParts, run: PooledRun, reader: Float[Tensor, "pool d_model width"]
) -> Float[Tensor, "image layer token head width"]:
    layers = []
    for layer in range(parts.n_layers):
        # One small matrix for each head; nothing is as wide as the stream for every token.
        each = einsum(parts.out[layer], reader, "h d m, g m w -> g h d w")
        if run.z is not None:
            layers.append(einsum(run.z[:, layer], each, "b g h d, g h d w -> b h w").unsqueeze(1))
            continue
        assert run.patterns is not None
        assert run.values is not None
        weighted = einsum(run.patterns[:, layer], run.values[:, layer], "b g h n, b n h d -> h b n g d")
        flat = rearrange(weighted, "h b n g d -> h (b n) (g d)")
        out = torch.bmm(flat, rearrange(each, "g h d w -> h (g d) w"))
        layers.append(rearrange(out, "h (b n) w -> b n h w", b=weighted.shape[1]))
    return torch.stack(layers, 1)


def _uniform(
    parts: TowerParts,
    run: PooledRun,
    heads: Tensor,
    mlps: Tensor,
    biases: Tensor,
    plain: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor]:
    n_terms = 2 * parts.n_layers + 1
    cells = heads.shape[2] * heads.shape[3]
    mean = einsum(run.mean, plain, "b g, g m w -> b w")
    own_share = (offset - mean) / n_terms
    shared = (biases + own_share.unsqueeze(1)) / cells
    return heads + rearrange(shared, "b l w -> b l 1 1 w"), mlps + own_share.unsqueeze(1)


def _grid(parts: TowerParts, inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    record = parts.tower.record
    if record.role != "vision" or record.patch is None:
        return None
    return parts.tower.patch_layout(inputs[parts.tower.input_name]).grid
