"""What every head and MLP of an image tower adds to a contrastive model's own logit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.model import check_pool, check_sites
from methods_multimodal.core.outputs import contrast_of, logit_scale
from methods_multimodal.core.positions import in_rows
from methods_multimodal.core.record import Record
from methods_multimodal.lenses.residual_parts import needed_sites, project, reads, writes
from mm_adapters import Model


@dataclass(frozen=True)
class LogitAttribution(Record):
    """Each part's share of each logit, for each image and each target (a text, a token).

    `embed` is what enters the first block, `attn_bias` the output bias of each attention, `bias`
    what the final norm's own bias adds, and the unembedding's if there is one. `total` is the sum of
    the shares, `logit` what the model itself said.
    """

    embed: Float[Tensor, "image text"]
    heads: Float[Tensor, "image text layer head"]
    attn_bias: Float[Tensor, "image text layer"]
    mlps: Float[Tensor, "image text layer"]
    bias: Float[Tensor, "image text"]
    logit: Float[Tensor, "image text"]
    texts: tuple[str, ...]

    @property
    def total(self) -> Float[Tensor, "image text"]:
        """The sum of all shares."""
        return self.embed + self.heads.sum((-1, -2)) + self.attn_bias.sum(-1) + self.mlps.sum(-1) + self.bias

    @property
    def residual(self) -> float:
        """How far the shares are from summing to the model's logit, relative to the largest logit."""
        return float((self.total - self.logit).abs().max() / self.logit.abs().max())

    def shares(self, image: int = 0, text: int = 0) -> dict[str, float]:
        """One logit's shares by part, the heads of a layer together; they sum to `total`."""
        named = {"embedding": float(self.embed[image, text])}
        for layer in range(self.mlps.shape[-1]):
            named[f"heads of layer {layer}"] = float(self.heads[image, text, layer].sum())
            named[f"MLP of layer {layer}"] = float(self.mlps[image, text, layer])
        named["attention biases"] = float(self.attn_bias[image, text].sum())
        named["final norm's bias"] = float(self.bias[image, text])
        return named

    def minus(self, first: int, second: int) -> LogitAttribution:
        """The shares of the difference between two of the targets' logits."""
        fields = ("embed", "heads", "attn_bias", "mlps", "bias", "logit")
        values = {f: getattr(self, f)[:, [first]] - getattr(self, f)[:, [second]] for f in fields}
        return replace(self, **values, texts=(f"{self.texts[first]} − {self.texts[second]}",))


def attribute_logits(
    model: Model, inputs: Mapping[str, Any], *, texts: Sequence[str] | None = None
) -> LogitAttribution:
    """Splits each image-text logit into what each part of the image tower adds to it.

    Every part is centred, divided by the final LayerNorm's own scale and multiplied by its gain,
    projected into the joint space and compared with the text's unit vector; then come the division
    by the image's length and the logit scale. No part is approximated, so the shares sum to the logit.

    `inputs` are images and texts, raw or prepared; `texts` names the texts in the result.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits (direct logit
    attribution); Gandelsman et al. 2024, arXiv 2310.05916 (for CLIP).
    Raises: MissingSiteError if the tower's summary is no linear map of its first position.
    """
    tower = model.check_tower("vision")
    check_sites(model, needed_sites(tower))
    check_pool(tower, "first")
    norm = tower.final_norm
    assert norm is not None
    scale = logit_scale(model)
    run = model.run(inputs, read=reads(tower, lambda x: x[:, 0]))
    output = contrast_of(run.output)
    parts = writes(run.values, tower)
    gain, offset = norm.gain.detach().float(), norm.bias.detach().float()
    weight = tower.projection
    matrix = torch.eye(parts.embed.shape[-1]).to(gain) if weight is None else weight.detach().float()
    length = ((parts.normalized * gain + offset) @ matrix).norm(dim=-1, keepdim=True)
    factor = scale / length
    readers = matrix @ output.texts.detach().float().T
    shares = project(parts, gain[:, None] * readers, factor, centred=norm.kind == "LN")
    n_texts = output.texts.shape[0]
    return LogitAttribution(
        embed=shares.embed,
        heads=shares.heads,
        attn_bias=shares.attn_bias,
        mlps=shares.mlps,
        bias=offset @ readers * factor,
        logit=output.logits.detach().float(),
        texts=tuple(texts) if texts is not None else tuple(f"text {i}" for i in range(n_texts)),
    )


def attribute_tokens(
    model: Model,
    inputs: Mapping[str, Any],
    tokens: Sequence[int],
    *,
    position: int = -1,
    names: Sequence[str] | None = None,
    tower: str = "language",
) -> LogitAttribution:
    """Splits the logit of each token, at one position, into what each part of a language tower adds.

    `text` in the shapes of the record is then a token, called as in `names`. Rows are rows of the batch.
    Position -1 is the last position of each row that its attention mask has, -2 the one before it. From 0
    on it is the position itself, counted over the whole sequence with its padding.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    Raises: MissingSiteError if the tower has no unembedding, or no single stream that its parts add to;
    InputError if a row has no such position.
    """
    view = model.check_tower(tower)
    check_sites(model, needed_sites(view))
    norm, bias = view.final_norm, view.unembedding_bias
    assert norm is not None
    ids = torch.as_tensor(list(tokens), device=view.unembedding.device)
    at = in_rows(model, inputs, position, tower)
    run = model.run(inputs, read=reads(view, at.of))
    parts = writes(run.values, view)
    directions = view.token_directions(ids).detach().float().T
    ones = torch.ones_like(parts.scale)
    shares = project(parts, directions, ones, centred=norm.kind == "LN")
    logits = at.of(view.vocabulary_logits(run.output))[:, ids].detach().float()
    return LogitAttribution(
        embed=shares.embed,
        heads=shares.heads,
        attn_bias=shares.attn_bias,
        mlps=shares.mlps,
        bias=bias.detach().float()[ids].expand_as(logits).clone(),
        logit=logits,
        texts=tuple(names) if names is not None else tuple(f"token {int(i)}" for i in ids),
    )
