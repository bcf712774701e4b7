"""What is lost along each text when a head is held at its mean: on its direct path, and in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.batches import prepared
from methods_multimodal.core.embed import embed_texts
from methods_multimodal.core.model import model_summary
from methods_multimodal.core.progress import all_images, run_pass
from methods_multimodal.core.record import Record
from methods_multimodal.text_explanations.name_heads import head_basis, head_coordinates
from methods_multimodal.text_explanations.pooled_run import run_pooled
from methods_multimodal.text_explanations.tower_parts import TowerParts, tower_parts
from methods_multimodal.text_explanations.vocabulary import Vocabulary
from mm_adapters import Edit, InputError, Model

DIRECT_ENOUGH = 0.5
"""From this correlation on, a head's direct path is taken to speak for all that it does."""


@dataclass(frozen=True)
class HeadEffects(Record):
    """What each head puts into the embeddings along each text, directly and in all.

    A head is held at its mean over images, position by position. `direct` is what then goes of the
    embeddings' variance along a text if nothing that reads the head is run again: the covariance of the
    head's own part with the embedding, both along the text, in squared cosines. `total` is the same of all
    that changes in the running model. To first order: what goes is negative where the head works against
    the text. `variance` is the embeddings' own along each text.

    `correlation` is that of the head's direct part with the whole change, over images and directions; `size`
    the variance of the whole change over that of the direct part. A head of low correlation acts through
    later layers, and names of its direct path do not say what it does.
    """

    texts: tuple[str, ...]
    groups: tuple[str, ...]
    direct: Float[Tensor, "layer head text"]
    total: Float[Tensor, "layer head text"]
    variance: Float[Tensor, " text"]
    correlation: Float[Tensor, "layer head"]
    size: Float[Tensor, "layer head"]
    n_images: int

    def lost(self, layer: int, head: int, path: str = "total") -> dict[str, float]:
        """What goes along the texts of each group, their mean, most first; of `path` "direct" or "total"."""
        if path not in ("direct", "total"):
            raise InputError(f"There is no path {path!r}; there is direct and total.")
        values = (self.direct if path == "direct" else self.total)[layer, head]
        by_group = {
            group: float(values[[i for i, other in enumerate(self.groups) if other == group]].mean())
            for group in dict.fromkeys(self.groups)
        }
        return dict(sorted(by_group.items(), key=lambda pair: -pair[1]))

    def text(self, layer: int, head: int, path: str = "total") -> str:
        """The text along which most goes, of the group along which most goes."""
        group = next(iter(self.lost(layer, head, path)))
        values = (self.direct if path == "direct" else self.total)[layer, head]
        return self.texts[max((i for i, g in enumerate(self.groups) if g == group), key=lambda i: values[i])]

    def is_direct(self, layer: int, head: int, least: float = DIRECT_ENOUGH) -> bool:
        """Whether the direct path speaks for all that the head does."""
        return bool(self.correlation[layer, head] >= least)


def head_effects(
    model: Model, images: Any, words: Vocabulary, *, batch_size: int = 32, skip_unreadable: bool = False
) -> HeadEffects:
    """What every head of the image tower puts into the embeddings along each text, directly and in all.

    One pass gathers each head's mean output at each position; in a second one every batch is run once more
    for each head, with that head held at its mean. That is layers times heads runs: give some hundred images.

    Args:
        model: A model of images and texts.
        images: A folder, or a sequence of pictures, paths or prepared pixels.
        words: The texts.
        batch_size: Images of one run.
        skip_unreadable: Leaves out images that cannot be read, instead of an error.

    Source: mean ablation, as Gandelsman et al. 2024, arXiv 2310.05916, section 3 (direct effects); of total
    and direct effects, Pearl 2001, arXiv 1301.2300.
    Raises: InputError for fewer than two images, for images that differ in their number of patches, and for
    one that cannot be read, unless `skip_unreadable`.
    """
    parts = tower_parts(model, "vision")
    items = all_images(images)
    if len(items) < 2:
        raise InputError(f"An effect is a change from the mean over images; {len(items)} is not enough.")
    texts = embed_texts(model, words.texts)
    if texts.shape[1] != parts.width:
        raise InputError(
            f"Texts are {texts.shape[1]} wide and this tower's summary {parts.width}: no joint space."
        )
    options: dict[str, Any] = {"batch_size": batch_size, "skip_unreadable": skip_unreadable, "file": None}
    sites = [parts.site("attn.hook_z", layer) for layer in range(parts.n_layers)]

    def gather(state: dict[str, Tensor], batch: list[Any], numbers: list[int]) -> dict[str, Tensor]:
        run = model.run(prepared(model, parts.tower, batch), read=sites)
        return {"count": state["count"] + len(batch)} | {s: _added(state.get(s), run[s], s) for s in sites}

    start = {"count": torch.tensor(0)}
    seen = run_pass(items, gather, start, settings="means", label="means of heads", **options).state
    means = {site: seen[site] / seen["count"] for site in sites}
    basis = head_basis(parts)

    def measure(state: dict[str, Tensor], batch: list[Any], numbers: list[int]) -> dict[str, Tensor]:
        return _sums(state, _changes(model, parts, prepared(model, parts.tower, batch), basis, means), texts)

    sums = run_pass(
        items, measure, {}, settings="effects", label="heads held at their means", **options
    ).state
    return _effects(sums, words, int(seen["count"]))


def _added(total: Tensor | None, value: Tensor, site: str) -> Tensor:
    here = value.detach().double().sum(0)
    if total is None:
        return here
    if total.shape != here.shape:
        raise InputError(
            f"{site} has {len(here)} positions for one image and {len(total)} for another: there is no mean "
            "over images. Give images of one size."
        )
    return total + here


def _changes(
    model: Model, parts: TowerParts, inputs: Mapping[str, Any], basis: Tensor, means: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [image, width] of length one; what heads add, and what goes without them, as much scaled."""
    run = run_pooled(model, parts, inputs, tokens=False)
    length = run.embedding.norm(dim=-1)
    direct = einsum(head_coordinates(parts, run), basis, "n l h i, l h i w -> n l h w")
    changes = []
    for layer in range(parts.n_layers):
        site = parts.site("attn.hook_z", layer)
        for head in range(parts.n_heads):
            without = model.run(inputs, read=[], edit=[Edit(site, _HeldAt(means[site], head))])
            changes.append(run.embedding - model_summary(parts.tower, without.output))
    total = rearrange(torch.stack(changes, 1), "n (l h) w -> n l h w", l=parts.n_layers)
    return run.embedding / length[:, None], direct, total / rearrange(length, "n -> n 1 1 1")


class _HeldAt:
    """Puts one head at its mean."""

    def __init__(self, mean: Float[Tensor, "pos head d_head"], head: int) -> None:
        self._mean, self._head = mean[:, head], head

    def __call__(self, value: Tensor) -> Tensor:
        held = value.clone()
        held[:, :, self._head] = self._mean.to(held)
        return held


def _sums(
    state: Mapping[str, Tensor], values: tuple[Tensor, Tensor, Tensor], texts: Tensor
) -> dict[str, Tensor]:
    embedding, direct, total = (value.double() for value in values)
    texts = texts.to(embedding)
    own = embedding @ texts.T
    sums = {"own": own.sum(0), "own own": own.square().sum(0)}
    for name, change in (("direct", direct), ("total", total)):
        along = change @ texts.T
        sums[f"{name} along"] = along.sum(0)
        sums[f"{name} own"] = einsum(along, own, "n l h t, n t -> l h t")
        sums[name] = change.sum(0)
        sums[f"{name} {name}"] = change.square().sum((0, -1))
    sums["direct total"] = (direct * total).sum((0, -1))
    return {name: state[name] + value if state else value for name, value in sums.items()}


def _effects(sums: Mapping[str, Tensor], words: Vocabulary, n: int) -> HeadEffects:
    def covariance(a: str, b: str) -> Tensor:
        return sums[f"{a} {b}"] / n - (sums[a] * sums[b]).sum(-1) / n**2

    def lost(path: str) -> Tensor:
        return (sums[f"{path} own"] / n - sums[f"{path} along"] * sums["own"] / n**2).float().cpu()

    direct, total = covariance("direct", "direct"), covariance("total", "total")
    both = covariance("direct", "total")
    return HeadEffects(
        texts=words.texts,
        groups=words.groups,
        direct=lost("direct"),
        total=lost("total"),
        variance=(sums["own own"] / n - (sums["own"] / n).square()).float().cpu(),
        correlation=(both / (direct * total).clamp_min(1e-30).sqrt()).float().cpu(),
        size=(total / direct.clamp_min(1e-30)).float().cpu(),
        n_images=n,
    )
