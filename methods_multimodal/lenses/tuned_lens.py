"""A logit lens whose states are first put into the last layer's terms, by one trained map for each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.kept import kept
from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.lenses._entries import Positions, entries_of
from methods_multimodal.lenses._training import Maps, by_row, choose, kl, train
from methods_multimodal.lenses.logit_lens import (
    checked_sites,
    checked_tokens,
    reading,
    stream_at,
)
from methods_multimodal.lenses.reading import LensReading
from mm_adapters import InputError, Model, Read, TowerView
from mm_adapters.store import of_tensors

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class TunedLens(Record):
    """One affine map for each layer's input, `h + h @ weight + bias`, and how good it is on held-out rows.

    `kl` is the divergence, in nats, of what the lens says from what the model says in the end; `logit_kl`
    that of the logit lens; `constant_kl` that of the mean of the model's answers on the training batches,
    whatever the state. `rate` is each layer's learning rate, chosen on the validation batches. `weights` is
    the fingerprint of the tower that it was trained for.
    """

    weight: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer d_model"]
    kl: Float[Tensor, "row layer"]
    logit_kl: Float[Tensor, "row layer"]
    constant_kl: Float[Tensor, " row"]
    rate: Float[Tensor, " layer"]
    weights: str
    tower: str = "language"

    def held_out(self, layer: int) -> Estimate:
        """The lens' divergence at the input of a block, with its interval over rows."""
        return bootstrap(self.kl[:, [layer]])

    def gain(self, layer: int) -> Estimate:
        """By how much it is below the logit lens', paired by row."""
        return bootstrap(self.logit_kl[:, [layer]], than=self.kl[:, [layer]])


def train_tuned_lens(
    model: Model,
    training: Sequence[Batch],
    validation: Sequence[Batch],
    test: Sequence[Batch],
    *,
    position: Positions = "all",
    n_steps: int = 400,
    rates: Sequence[float] = (1e-3, 3e-3, 1e-2),
    tower: str = "language",
    folder: str | Path | None = None,
) -> TunedLens:
    """Trains a tuned lens and measures it on batches that it was neither trained nor chosen on.

    Every map begins as the identity, where it is the logit lens. The model runs once for each step and each
    held-out batch; nothing grows with the number of batches.

    Args:
        model: One with a language tower.
        training: Batches of the model's own arguments; they are met in turn.
        validation: Batches on which each layer's learning rate is chosen.
        test: Batches on which the lens' divergence is measured.
        position: Which positions are learned from, as in `logit_lens`.
        n_steps: Steps of Adam, each on one batch; the rate falls to zero in a line.
        rates: The learning rates that are tried, from the same batches.
        tower: The language tower's name.
        folder: Where progress is written: a training that was killed goes on there, with the same result.

    Source: Belrose et al. 2023, arXiv 2303.08112 (Adam in place of SGD with momentum).
    Raises: MissingSiteError as `logit_lens`; InputError without batches, rates or steps; StoreError for a
    folder that holds other work.
    """
    view = model.check_tower(tower)
    sites = checked_sites(model, view)[:-1]
    check_batches(training, validation, test, rates, n_steps)
    for batch in (training[0], validation[0], test[0]):
        entries_of(model, batch, position, tower)
    unembed = _float_unembedding(view)
    read = _reader(model, view, sites, position)

    def losses(batch: Batch) -> Callable[[Maps], Tensor]:
        states, own, _ = read(batch)
        return lambda maps: kl(own, unembed(moved(states, maps["weight"], maps["bias"]))).mean(0)

    width = view.unembedding.shape[0]
    start = {
        "weight": torch.zeros(len(sites), width, width, device=view.unembedding.device),
        "bias": torch.zeros(len(sites), width, device=view.unembedding.device),
    }
    made_of: dict[str, Any] = {"models": {"model": model}, "data": list(training), "rates": list(rates)}
    position_said = position if isinstance(position, int | str) else list(position)
    made_of |= {"n_steps": n_steps, "tower": tower, "position": position_said}
    with kept(folder, job="train_tuned_lens", **made_of) as work:
        file = work.inside("steps.safetensors")
        tried = train(training, losses, start, rates=rates, n_steps=n_steps, file=file)
    with torch.no_grad():
        chosen, rate = choose(tried, losses, validation, rates)
        mean = torch.stack([read(batch)[1].softmax(-1).mean(0) for batch in training[:16]]).mean(0)
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in test:
            states, own, at = read(batch)
            said = (moved(states, **chosen), states)
            constant = mean.clamp_min(1e-12).log().expand(len(own), 1, -1)
            tuned, logit, flat = (by_row(kl(own, x), at) for x in (*map(unembed, said), constant))
            rows.append((tuned, logit, flat[:, 0]))
    tuned, logit, flat = (torch.cat(parts).cpu() for parts in zip(*rows, strict=True))
    return TunedLens(
        weight=chosen["weight"],
        bias=chosen["bias"],
        kl=tuned,
        logit_kl=logit,
        constant_kl=flat,
        rate=rate,
        weights=fingerprint(view),
        tower=tower,
    )


def tuned_lens(
    model: Model,
    inputs: Batch,
    trained: TunedLens,
    *,
    position: Positions = -1,
    tokens: Sequence[int] | None = None,
) -> LensReading:
    """`logit_lens` with each state moved by the trained map of its layer; the last one is the model's own.

    Source: Belrose et al. 2023, arXiv 2303.08112
    Raises: as `logit_lens`; InputError if the lens was trained for other weights.
    """
    view = model.check_tower(trained.tower)
    sites = checked_sites(model, view)
    check_made_for(view, trained.weights, "tuned lens")
    kept_tokens = checked_tokens(view, tokens)
    entries = entries_of(model, inputs, position, trained.tower)
    states, last, own = stream_at(model, inputs, view, sites, entries)
    unembed = _float_unembedding(view)
    with torch.no_grad():
        here = torch.stack(states, 1).float()
        said = unembed(moved(here, trained.weight.to(here), trained.bias.to(here)))
    gap = float((last - own).abs().max())
    return reading(model, view, [*said.unbind(1), last], entries, kept_tokens, lens_name="tuned", own_gap=gap)


def moved(
    states: Float[Tensor, "entry layer d_model"],
    weight: Float[Tensor, "layer d_model d_model"],
    bias: Float[Tensor, "layer d_model"],
) -> Float[Tensor, "entry layer d_model"]:
    """States in the last layer's terms."""
    return states + einsum(states, weight, "entry layer d, layer d out -> entry layer out") + bias


def fingerprint(view: TowerView, *, head: bool = True) -> str:
    """What tells a tower's weights, and its head's, from others."""
    weights = dict(view.module.named_parameters())
    return of_tensors(weights | ({"unembedding": view.unembedding.detach().contiguous()} if head else {}))


def check_made_for(view: TowerView, weights: str, what: str, *, head: bool = True) -> None:
    """Raises: InputError if a lens or an index was made for other weights than the tower's."""
    if fingerprint(view, head=head) != weights:
        raise InputError(
            f"This {what} was made for other weights than those of the {view.name} tower: its numbers mean "
            "nothing here. Make one for this model, or load the model that it was made for."
        )


def _float_unembedding(view: TowerView) -> Callable[[Tensor], Tensor]:
    """The unembedding of float32 states, which gradients can pass."""
    norm = view.final_norm
    assert norm is not None
    matrix, bias = view.unembedding.detach().float(), view.projection_bias
    dtype = norm.gain.dtype

    def unembed(states: Tensor) -> Tensor:
        logits = norm.module(states.to(dtype)).float() @ matrix
        return logits if bias is None else logits + bias.detach().float()

    return unembed


def _reader(
    model: Model, view: TowerView, sites: Sequence[str], position: Positions
) -> Callable[[Batch], tuple[Tensor, Tensor, Tensor]]:
    """What gives a batch's states [entry, site, ...], the model's own logits there, and each entry's row."""

    def read(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        entries = entries_of(model, batch, position, view.name)
        run = model.run(batch, read=[Read(s, reduce=entries.of) for s in sites])
        states = torch.stack([run[s].detach().float() for s in sites], 1)
        return states, entries.of(view.vocabulary_logits(run.output)).detach().float(), entries.rows

    return read


def check_batches(
    training: Sequence[Batch],
    validation: Sequence[Batch],
    test: Sequence[Batch],
    rates: Sequence[float],
    n_steps: int,
) -> None:
    """Raises: InputError without batches, rates or steps."""
    for name, batches in (("training", training), ("validation", validation), ("test", test)):
        if not len(batches):
            raise InputError(f"There are no {name} batches: a lens is judged on others than it is made of.")
    if not len(rates) or min(rates) <= 0 or n_steps < 1:
        raise InputError(f"rates={tuple(rates)}, n_steps={n_steps}: give learning rates above 0, and steps.")
