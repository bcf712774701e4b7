"""Every head of an image tower, named in words, over any number of images in the same memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from methods_multimodal.core.batches import prepared
from methods_multimodal.core.embed import embed_texts, unit
from methods_multimodal.core.progress import all_images, name_of, run_pass
from methods_multimodal.core.record import Record
from methods_multimodal.text_explanations.moments import Moments
from methods_multimodal.text_explanations.pooled_run import PooledRun, run_pooled
from methods_multimodal.text_explanations.readable import readability
from methods_multimodal.text_explanations.text_null import rotated_shares
from methods_multimodal.text_explanations.text_span import NothingVariesError, TextSpan, text_span
from methods_multimodal.text_explanations.tower_parts import TowerParts, tower_parts
from methods_multimodal.text_explanations.vocabulary import Vocabulary
from mm_adapters import InputError, Model
from mm_adapters.store import provenance, work_folder

# The level at which a head counts as named, as is usual; not tuned.
LEVEL = 0.01
# Above this share of texts that the model cannot read, names say little.
MANY_UNREAD = 0.5


@dataclass(frozen=True)
class HeadNames(Record):
    """Each head's texts, best first, and the images that lie furthest along each.

    `chosen` are numbers of `texts`; -1 where nothing was left to name. `variance_explained` is the
    share of the head's variance along its first so many texts, `variance` the head's variance as a
    share of that of the embeddings (unit vectors, so heads that cancel may add up to more than one).
    `top_images` are numbers of images, `top_files` the names of those that occur, `scores` how far
    they lie from the head's mean along the text's direction.

    Names describe the direct path only: what a head itself adds to the embeddings, not what later layers
    make of its output (`head_effects` measures both). `null_share` is the share along the first text of
    the same vocabulary turned at random (its mean over turns), `p_value` the share of turns whose first
    text explains as much, with one added to both counts; 1 where nothing varies. `unread` are the numbers
    of texts that the model embeds as it does random letters.
    """

    texts: tuple[str, ...]
    groups: tuple[str, ...]
    chosen: Int[Tensor, "layer head text"]
    variance_explained: Float[Tensor, "layer head text"]
    variance: Float[Tensor, "layer head"]
    null_share: Float[Tensor, "layer head"]
    p_value: Float[Tensor, "layer head"]
    top_images: Int[Tensor, "layer head text top"]
    scores: Float[Tensor, "layer head text top"]
    top_files: tuple[tuple[int, str], ...]
    n_images: int
    unreadable: tuple[tuple[str, str], ...] = ()
    unread: tuple[int, ...] = ()

    def is_named(self, layer: int, head: int, level: float = LEVEL) -> bool:
        """Whether its first text explains more than texts turned at random do, at this level."""
        return bool(self.p_value[layer, head] <= level)

    def names(self, layer: int, head: int) -> list[str]:
        """One head's texts."""
        return [self.texts[i] for i in self.chosen[layer, head].tolist() if i >= 0]

    def about(self, layer: int, head: int) -> list[str]:
        """The groups (attributes) that one head's texts are in."""
        return [self.groups[i] for i in self.chosen[layer, head].tolist() if i >= 0]


def name_heads(
    model: Model,
    images: Any,
    words: Vocabulary,
    *,
    n_texts: int = 5,
    rank: int = 80,
    top: int = 4,
    centre_texts: bool = False,
    n_null: int = 99,
    folder: str | Path | None = None,
    batch_size: int = 32,
    skip_unreadable: bool = False,
    every: int = 16,
) -> HeadNames:
    """Names every head of the image tower from what it adds to the embeddings of these images.

    One pass gathers each head's mean and second moment, TextSpan names the heads from these, and a
    second pass finds the images furthest along each text.

    Args:
        images: A folder, or a sequence of pictures, paths or prepared pixels.
        words: The texts to name heads with.
        n_texts: How many texts name a head.
        rank: How many leading directions of a head's output the texts are projected on.
        top: How many images are kept for each text of a head.
        centre_texts: Takes the texts' mean off first, which the published method does not.
        n_null: How often the texts are turned at random, together, to say what share of a head's variance
            texts explain that point nowhere in particular.
        folder: Where the work is written down; a run that was killed goes on there, to the same result.
        batch_size: Images of one run.
        skip_unreadable: Leaves out images that cannot be read, instead of an error.
        every: After how many batches the work is written down.

    Source: Gandelsman et al. 2024, arXiv 2310.05916, sections 4 and 5.
    Raises: InputError for an image that cannot be read, unless `skip_unreadable`; those skipped are
    listed in the result. StoreError for a folder with work of something else.
    """
    parts = tower_parts(model, "vision")
    items = all_images(images)
    if len(items) < 2:
        raise InputError(f"Heads are named by what varies between images; {len(items)} is not enough.")
    if n_null < 1:
        raise InputError(f"n_null={n_null}: a null needs one turn of the texts, and 99 for p = 0.01.")
    texts = embed_texts(model, words.texts)
    if texts.shape[1] != parts.width:
        raise InputError(
            f"Texts are {texts.shape[1]} wide and this tower's summary {parts.width}: no joint space."
        )
    texts = texts - texts.mean(0) if centre_texts else texts
    basis = head_basis(parts)
    options = {"batch_size": batch_size, "skip_unreadable": skip_unreadable, "every": every}
    work: Any = nullcontext()
    if folder is not None:
        settings = {"n_texts": n_texts, "rank": rank, "top": top, "centre_texts": centre_texts}
        work = work_folder(
            folder,
            provenance(
                models={"model": model},
                data=(Path(i) if isinstance(i, str) else i for i in items),
                job="name_heads",
                words=list(words.texts),
                batch_size=batch_size,
                **settings,
            ),
        )
    with work as where:
        return _named(model, parts, items, words, texts, basis, where, n_texts, rank, top, n_null, options)


def _named(
    model: Model,
    parts: TowerParts,
    items: Sequence[Any],
    words: Vocabulary,
    texts: Tensor,
    basis: Tensor,
    where: Path | None,
    n_texts: int,
    rank: int,
    top: int,
    n_null: int,
    options: Mapping[str, Any],
) -> HeadNames:

    def run_on(batch: list[Any]) -> PooledRun:
        return run_pooled(model, parts, prepared(model, parts.tower, batch), tokens=False)

    def gather(state: dict[str, Tensor], batch: list[Any], numbers: list[int]) -> dict[str, Tensor]:
        run = run_on(batch)
        moments = _moments(state, basis).plus(head_coordinates(parts, run))
        return _state(moments, state["embeddings"] + unit(run.embedding).double().sum(0))

    blank = Moments.none(parts.n_layers, parts.n_heads, basis.shape[2], device=basis.device)
    start = _state(blank, torch.zeros(parts.width, dtype=torch.float64, device=basis.device))
    file = where and where / "moments.safetensors"
    first = run_pass(items, gather, start, settings="moments", label="what heads write", file=file, **options)
    moments = _moments(first.state, basis)
    spans = [
        [_span(moments[layer, head], texts, rank, n_texts, words) for head in range(parts.n_heads)]
        for layer in range(parts.n_layers)
    ]
    table, explained, axes, middle = _tables(spans, basis, n_texts)
    null = rotated_shares(moments, texts, rank, n=n_null).cpu()
    as_much = (null >= explained[..., 0]).sum(0).double()

    def best(state: dict[str, Tensor], batch: list[Any], numbers: list[int]) -> dict[str, Tensor]:
        along = einsum(head_coordinates(parts, run_on(batch)), axes, "n l h i, l h i t -> l h t n")
        return _merged(state, (along - middle.unsqueeze(-1)).cpu(), torch.tensor(numbers), top)

    empty = {"scores": torch.zeros(*table.shape, 0), "images": torch.zeros(*table.shape, 0).long()}
    file = where and where / "top.safetensors"
    second = run_pass(items, best, empty, settings="top", label="images furthest along", file=file, **options)
    top_images = second.state["images"]
    used = sorted(set(top_images.flatten().tolist()))
    return HeadNames(
        texts=words.texts,
        groups=words.groups,
        chosen=table,
        variance_explained=explained,
        variance=_variance(moments, first.state["embeddings"]),
        null_share=null.nan_to_num(0).mean(0),
        p_value=torch.where(table[..., 0] >= 0, (1 + as_much) / (1 + n_null), 1.0),
        top_images=top_images,
        scores=second.state["scores"],
        top_files=tuple((i, name_of(items[i], i)) for i in used),
        n_images=moments.count,
        unreadable=tuple((name_of(items[i], i), why) for i, why in first.unreadable),
        unread=readability(model, words).unread(),
    )


def head_basis(parts: TowerParts) -> Float[Tensor, "layer head coordinate width"]:
    """What a head's coordinates stand for: the directions its output matrix writes, in the joint space."""
    each = [rearrange(parts.head_readers(i), "g h d w -> h (g d) w") for i in range(parts.n_layers)]
    basis = torch.stack(each)
    if basis.shape[2] > basis.shape[3]:  # Pooled by many heads it may write everything.
        return torch.eye(basis.shape[3]).to(basis).expand(*basis.shape[:2], -1, -1)
    return basis


def head_coordinates(parts: TowerParts, run: PooledRun) -> Float[Tensor, "image layer head coordinate"]:
    """What each head adds to each embedding, of length one, in `head_basis`."""
    assert run.z is not None
    narrow = rearrange(run.z, "b l g h d -> b l h (g d)")
    if narrow.shape[-1] > parts.width:
        layers = range(parts.n_layers)
        each = [einsum(run.z[:, i], parts.head_readers(i), "b g h d, g h d w -> b h w") for i in layers]
        narrow = torch.stack(each, 1)
    return narrow / rearrange(run.embedding.norm(dim=-1), "b -> b 1 1 1")


def _state(moments: Moments, embeddings: Tensor) -> dict[str, Tensor]:
    count = torch.tensor(moments.count)
    return {"count": count, "total": moments.total, "outer": moments.outer, "embeddings": embeddings}


def _moments(state: dict[str, Tensor], basis: Tensor) -> Moments:
    return Moments(
        int(state["count"]), state["total"].to(basis.device), state["outer"].to(basis.device), basis
    )


def _variance(moments: Moments, embeddings: Tensor) -> Float[Tensor, "layer head"]:
    """Each head's variance over that of the unit embeddings, whose squares sum to their number."""
    assert moments.basis is not None
    n, basis = moments.count, moments.basis.double()
    mean = moments.total / n
    covariance = moments.outer / n - einsum(mean, mean, "l h i, l h j -> l h i j")
    own = einsum(covariance, basis @ basis.mT, "l h i j, l h i j -> l h")
    return (own / (1 - (embeddings / n).square().sum())).float().cpu()


def _span(moments: Moments, texts: Tensor, rank: int, n_texts: int, words: Vocabulary) -> TextSpan | None:
    try:
        return text_span(moments, texts, rank, n_texts, words.texts)
    except NothingVariesError:
        return None


def _tables(
    spans: list[list[TextSpan | None]], basis: Tensor, n_texts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chosen texts, variance explained, each text's axis in coordinates, and the mean along it."""
    n_layers, n_heads, n_coordinates = basis.shape[:3]
    table = torch.full((n_layers, n_heads, n_texts), -1)
    explained = torch.zeros(n_layers, n_heads, n_texts)
    axes = torch.zeros(n_layers, n_heads, n_coordinates, n_texts, device=basis.device)
    middle = torch.zeros(n_layers, n_heads, n_texts, device=basis.device)
    for layer, row in enumerate(spans):
        for head, span in enumerate(row):
            if span is None:
                continue
            k = len(span.chosen)
            table[layer, head, :k] = torch.tensor(span.chosen)
            explained[layer, head, :k] = span.variance_explained.cpu()
            axes[layer, head, :, :k] = basis[layer, head] @ span.directions.to(basis).T
            middle[layer, head, :k] = span.directions.to(basis) @ span.mean.to(basis)
    return table, explained, axes, middle


def _merged(state: dict[str, Tensor], along: Tensor, numbers: Tensor, top: int) -> dict[str, Tensor]:
    """The best so far and the new ones, the best of both; of equals the earlier image."""
    scores = torch.cat([state["scores"], along], -1)
    images = torch.cat([state["images"], numbers.expand(*along.shape[:-1], -1)], -1)
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :top]
    return {"scores": scores.gather(-1, order), "images": images.gather(-1, order)}
