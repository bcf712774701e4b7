"""What each attention head's own output says of the answer, by one trained map from the head to words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.kept import kept
from methods_multimodal.core.model import check_sites
from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.lenses._entries import Positions, entries_of
from methods_multimodal.lenses._training import Maps, by_row, choose, kl, train
from methods_multimodal.lenses.logit_lens import checked_tokens, reading
from methods_multimodal.lenses.reading import LensReading
from methods_multimodal.lenses.tuned_lens import Batch, check_batches, check_made_for, fingerprint
from mm_adapters import Model, Read, TowerView


@dataclass(frozen=True)
class AttentionLens(Record):
    """One map from each head's output to the vocabulary's logits, and how good it is on held-out rows.

    `kl` is the divergence, in nats, of what a head's map says from what the model says in the end;
    `direct_kl` that of the head's output read by the model's own unembedding, untrained; `constant_kl` that
    of the mean of the model's answers on the training batches, whatever the head gave: a head whose map is
    not below it tells nothing of the answer.
    """

    weight: Float[Tensor, "head d_head token"]
    bias: Float[Tensor, "head token"]
    kl: Float[Tensor, "row head"]
    direct_kl: Float[Tensor, "row head"]
    constant_kl: Float[Tensor, " row"]
    rate: Float[Tensor, " head"]
    layer: int
    weights: str
    tower: str = "language"

    def held_out(self, head: int) -> Estimate:
        """A head's divergence, with its interval over rows."""
        return bootstrap(self.kl[:, [head]])

    def gain(self, head: int) -> Estimate:
        """By how much it is below that of the answers' mean, paired by row."""
        return bootstrap(self.constant_kl[:, None], than=self.kl[:, [head]])


def train_attention_lens(
    model: Model,
    layer: int,
    training: Sequence[Batch],
    validation: Sequence[Batch],
    test: Sequence[Batch],
    *,
    position: Positions = -1,
    n_steps: int = 400,
    rates: Sequence[float] = (1e-3, 3e-3, 1e-2),
    tower: str = "language",
    folder: str | Path | None = None,
) -> AttentionLens:
    """Trains a map for each head of one layer, from its output alone to the model's own answer.

    A map begins as what the head writes to the stream read by the unembedding (with the final norm's gain),
    beside the logarithm of the mean answer.

    Args:
        model: One with a language tower.
        layer: Whose heads.
        training: Batches of the model's own arguments; they are met in turn.
        validation: Batches on which each head's learning rate is chosen.
        test: Batches on which the lens' divergence is measured.
        position: Which positions are learned from, as in `logit_lens`.
        n_steps: Steps of Adam, each on one batch; the rate falls to zero in a line.
        rates: The learning rates that are tried, from the same batches.
        tower: The language tower's name.
        folder: Where progress is written: a training that was killed goes on there, with the same result.

    Source: Sakarvadia et al. 2023, arXiv 2310.16270
    Raises: MissingSiteError if the tower has no such layer, no head's output or no unembedding; InputError
    without batches, rates or steps; StoreError for a folder that holds other work.
    """
    view = model.check_tower(tower)
    site = _checked_site(model, view, layer)
    direct = _direct_map(view, layer)
    check_batches(training, validation, test, rates, n_steps)
    for batch in (training[0], validation[0], test[0]):
        entries_of(model, batch, position, tower)

    def read(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        entries = entries_of(model, batch, position, tower)
        run = model.run(batch, read=[Read(site, reduce=entries.of)])
        own = entries.of(view.vocabulary_logits(run.output)).detach().float()
        return run[site].detach().float(), own, entries.rows

    def losses(batch: Batch) -> Callable[[Maps], Tensor]:
        z, own, _ = read(batch)
        return lambda maps: kl(own, _said(z, maps)).mean(0)

    mean = torch.stack([read(batch)[1].softmax(-1).mean(0) for batch in training[:16]]).mean(0)
    constant = mean.clamp_min(1e-12).log()
    start = {"weight": direct, "bias": constant.expand(len(direct), -1).clone()}
    made_of: dict[str, Any] = {"models": {"model": model}, "data": list(training), "rates": list(rates)}
    said_position = position if isinstance(position, int | str) else list(position)
    made_of |= {"n_steps": n_steps, "tower": tower, "position": said_position, "layer": layer}
    with kept(folder, job="train_attention_lens", **made_of) as work:
        file = work.inside("steps.safetensors")
        tried = train(training, losses, start, rates=rates, n_steps=n_steps, file=file)
    with torch.no_grad():
        chosen, rate = choose(tried, losses, validation, rates)
        rows: list[tuple[Tensor, ...]] = []
        for batch in test:
            z, own, at = read(batch)
            untrained = {"weight": direct, "bias": torch.zeros_like(chosen["bias"])}
            said = (_said(z, chosen), _said(z, untrained), constant.expand(len(own), 1, -1))
            rows.append(tuple(by_row(kl(own, one), at) for one in said))
    trained, plain, flat = (torch.cat(parts).cpu() for parts in zip(*rows, strict=True))
    return AttentionLens(
        **chosen,
        kl=trained,
        direct_kl=plain,
        constant_kl=flat[:, 0],
        rate=rate,
        layer=layer,
        weights=fingerprint(view),
        tower=tower,
    )


def attention_lens(
    model: Model,
    inputs: Batch,
    trained: AttentionLens,
    *,
    position: Positions = -1,
    tokens: Sequence[int] | None = None,
) -> LensReading:
    """What each head of the lens' layer says at chosen positions; `layers` of the reading are its heads.

    Source: Sakarvadia et al. 2023, arXiv 2310.16270
    Raises: as `train_attention_lens`; InputError if the lens was trained for other weights.
    """
    view = model.check_tower(trained.tower)
    site = _checked_site(model, view, trained.layer)
    check_made_for(view, trained.weights, "attention lens")
    kept_tokens = checked_tokens(view, tokens)
    entries = entries_of(model, inputs, position, trained.tower)
    z = model.run(inputs, read=[Read(site, reduce=entries.of)])[site].detach().float()
    said = _said(z, {"weight": trained.weight.to(z), "bias": trained.bias.to(z)})
    one = reading(model, view, said.unbind(1), entries, kept_tokens, lens_name="attention", own_gap=None)
    return replace(one, layers=tuple(f"layer {trained.layer} head {i}" for i in range(said.shape[1])))


def _said(z: Float[Tensor, "entry head d_head"], maps: Maps) -> Float[Tensor, "entry head token"]:
    return einsum(z, maps["weight"], "entry head d, head d token -> entry head token") + maps["bias"]


def _direct_map(view: TowerView, layer: int) -> Float[Tensor, "head d_head token"]:
    """What a head writes, read by the unembedding; what the final norm divides by is left out."""
    w_o = view.weights(layer).names("attn")["W_O"]().detach().float()
    gain = 1.0 if view.final_norm is None else view.final_norm.gain.detach().float()
    return einsum(w_o * gain, view.unembedding.detach().float(), "head d m, m token -> head d token")


def _checked_site(model: Model, view: TowerView, layer: int) -> str:
    view.check_one_stream()
    site = f"{view.name}.blocks.{layer}.attn.hook_z"
    check_sites(model, [site])
    _ = view.unembedding
    return site
