"""CLIP-Dissect over a store of activations: streamed over images and concepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.embed import embed, unit
from methods_multimodal.core.record import Record
from methods_multimodal.dissection import similarity as kernels
from methods_multimodal.dissection.units import Pool, Units
from mm_adapters import InputError, Model
from mm_adapters.store import Column, Store, Writer, provenance

JUDGE = "judge"
# A shard closes when it is this large.
SHARD_BYTES = 32 * 2**20
# Concepts that are gone through at once, and similarities [image, concept] that are in memory at once.
_CONCEPTS = 512
_SIMILARITIES = 2**24
# Images whose similarities are made at once.
_ROWS = 256


@dataclass(frozen=True)
class ClipDissection(Record):
    """`scores[unit, concept]` of one kernel, larger for a better name."""

    scores: Float[Tensor, "unit concept"]
    names: tuple[str, ...]
    kernel: str
    site: str
    n_images: int

    def best(self, n: int = 1) -> list[tuple[str, ...]]:
        """Each unit's `n` best names, the best first."""
        return [tuple(self.names[i] for i in row) for row in self.scores.topk(n, 1).indices.tolist()]


def collect(
    units: Sequence[Units],
    batches: Sequence[tuple[Mapping[str, Any], Sequence[Any]]],
    judge: Model,
    folder: str | Path,
    *,
    pool: Pool = "mean",
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Store:
    """Every unit's activation on every picture, and the judge's embedding of it, in one pass, on disk.

    Killed and started again with the same arguments, it goes on where it was and ends with the same store.

    Args:
        units: The units of one or several sites.
        batches: Of each batch the model's inputs, and the pictures that they are, or make.
        judge: The contrastive model that sees the pictures.
        folder: Where the store is.
        pool: How the places of a picture become one number: "mean" or "max".
        about: What else the store should say that it was made of.
        progress: Whether to show a progress bar.

    Raises: StoreError if the folder holds another store.
    """
    if not batches:
        raise InputError("There are no pictures to probe with.")
    known = {
        **provenance(
            models={"judge": judge, **_models_of(units)},
            data=({"inputs": i, "pictures": "its images" if i.get("images") is p else p} for i, p in batches),
            sites=[u.site for u in units],
            job="dissection",
            pool=pool,
        ),
        **(about or {}),
    }
    judge.check_tower("vision")
    first, columns = None, _columns_of(Path(folder))
    if columns is None:
        first = _probe(units, batches[0], judge, pool)
        columns = {name: Column(tuple(v.shape[1:]), torch.float32) for name, v in first.items()}
    with Writer(folder, columns, known, shard_bytes=SHARD_BYTES) as writer:
        rest = [] if writer.complete else batches[writer.appends :]
        bar = tqdm(rest, initial=writer.appends, total=len(batches), desc="probing", disable=not progress)
        for batch in bar:
            rows = first if first is not None and batch is batches[0] else _probe(units, batch, judge, pool)
            writer.append(rows, items=len(batch[1]))
    return Store(folder)


def clip_dissect(
    store: Store,
    site: str,
    texts: Float[Tensor, "concept width"],
    names: Sequence[str],
    *,
    kernel: str = "soft_wpmi",
    progress: bool = True,
    **options: Any,
) -> ClipDissection:
    """Names the units of one site by the concepts that the judge sees in their strongest images.

    The similarities [image, concept] are never in memory together: soft_wpmi and wpmi hold those of a
    block of images, cosine only sums, the others a block.

    Args:
        store: What `collect` gave.
        site: Which site's units are named.
        texts: The judge's unit embeddings of the concepts.
        names: The concepts.
        kernel: One of `similarity.KERNELS`.
        progress: Whether to show progress bars.
        options: The kernel's own.

    Source: Oikarinen & Weng 2023, arXiv 2204.10965.
    Raises: InputError for an unknown kernel, too few images, or names that are not as many as texts.
    """
    if kernel not in kernels.KERNELS:
        raise InputError(f"No kernel {kernel!r}; there is {', '.join(kernels.KERNELS)}.")
    if len(names) != len(texts):
        raise InputError(f"There are {len(names)} names and {len(texts)} embeddings.")
    stream = Stream(store, site, texts.detach().float().cpu(), progress)
    scores = getattr(stream, kernel)(**options)
    return ClipDissection(scores, tuple(names), kernel, site, len(store))


class Stream:
    """The kernels of `similarity`, each in memory that does not grow with images times concepts."""

    def __init__(
        self, store: Store, site: str, texts: Float[Tensor, "concept width"], progress: bool
    ) -> None:
        self._store, self._site, self._texts, self._progress = store, site, texts, progress

    def soft_wpmi(
        self, top_k: int = 100, scale: float = 10.0, prior: float = 1.0, **options: float
    ) -> Tensor:
        """`similarity.soft_wpmi`, of blocks."""
        add = partial(kernels.accumulate_soft_likelihood, **options)
        offset = kernels.uninformative_score(len(self._texts), top_k, **options)
        return kernels.subtract_prior(self._by_top(add, top_k, scale), prior, offset)

    def wpmi(self, top_k: int = 28, scale: float = 2.0, prior: float = 0.6) -> Tensor:
        """`similarity.wpmi`, of blocks."""
        return kernels.subtract_prior(self._by_top(kernels.accumulate_log_likelihood, top_k, scale), prior)

    def cosine(self) -> Tensor:
        """From sums alone: a correlation with e . t is linear in sums over images of a, e, a e and e e."""
        n = len(self._store)
        a_sum: Tensor | float = 0.0
        e_sum: Tensor | float = 0.0
        a_square: Tensor | float = 0.0
        cross: Tensor | float = 0.0
        square: Tensor | float = 0.0
        for a, e in self._blocks():
            a, e = a.double(), e.double()
            a_sum, e_sum, a_square = a_sum + a.sum(0), e_sum + e.sum(0), a_square + a.square().sum(0)
            cross, square = cross + a.T @ e, square + e.T @ e
        assert isinstance(a_sum, Tensor)
        assert isinstance(e_sum, Tensor)
        texts = self._texts.double()
        shared = (cross - torch.outer(a_sum, e_sum) / n) @ texts.T
        a_size = (a_square - a_sum.square() / n).clamp_min(0).sqrt()
        spread = square - torch.outer(e_sum, e_sum) / n
        p_size = ((texts @ spread) * texts).sum(1).clamp_min(0).sqrt()
        return (shared / a_size[:, None].clamp_min(1e-12) / p_size.clamp_min(1e-12)).float()

    def cosine_cubed(self) -> Tensor:
        """`similarity.cosine_cubed`, of blocks."""
        n = len(self._store)
        a_mean = sum(a.double().sum(0) for a, _ in self._blocks()) / n
        e_mean = sum(e.double().sum(0) for _, e in self._blocks()) / n
        assert isinstance(a_mean, Tensor)
        assert isinstance(e_mean, Tensor)
        parts = []
        for texts in self._concepts():
            shared: Tensor | float = 0.0
            a_size: Tensor | float = 0.0
            p_size: Tensor | float = 0.0
            for a, e in self._blocks():
                cubes_a = (a - a_mean.float()) ** 3
                cubes_p = ((e - e_mean.float()) @ texts.T) ** 3
                shared = shared + cubes_a.T @ cubes_p
                a_size, p_size = a_size + cubes_a.square().sum(0), p_size + cubes_p.square().sum(0)
            assert isinstance(a_size, Tensor)
            assert isinstance(p_size, Tensor)
            parts.append(shared / a_size.sqrt().clamp_min(1e-3)[:, None] / p_size.sqrt().clamp_min(1e-3))
        return torch.cat(parts, 1)

    def rank_reorder(self, top_share: float = 0.05, **options: Any) -> Tensor:
        """`similarity.rank_reorder`, of blocks."""
        n_top = int(len(self._store) * top_share)
        if n_top < 2:
            raise InputError(f"The top {top_share:.0%} of {len(self._store)} images are {n_top}: too few.")
        values, top = self._top(n_top)
        embeddings = self._store.rows(columns=[JUDGE])[JUDGE]
        out = []
        for activation, images in zip(values, top, strict=True):
            similarity = embeddings[images] @ self._texts.T
            out.append(kernels.rank_reorder(similarity, activation[:, None], top_share=1.0, **options)[0])
        return torch.stack(out)

    def _by_top(self, add: Callable[..., None], top_k: int, scale: float) -> Tensor:
        """Each image's likelihoods are made once, used by the units that have it in their top, and gone."""
        if top_k > len(self._store):
            raise InputError(
                f"The top {top_k} of {len(self._store)} images were asked for. "
                "Give more images, or a smaller top_k."
            )
        top = self._top(top_k)[1]
        total = torch.zeros(len(top), len(self._texts))
        size = max(_ROWS, _SIMILARITIES // len(self._texts))
        likely, scaled = torch.empty(size, len(self._texts)), torch.empty(_ROWS, len(self._texts))
        nothing = torch.zeros(1)
        batches = self._store.batches(size, seed=None, columns=[JUDGE])
        n_batches = math.ceil(len(self._store) / size)
        first = 0
        for rows in tqdm(batches, "images", n_batches, disable=not self._progress, leave=False):
            embeddings = rows[JUDGE].float()
            n = len(embeddings)
            for some, out in zip(embeddings.split(_ROWS), likely[:n].split(_ROWS), strict=True):
                torch.addmm(nothing, some, self._texts.T, beta=0, alpha=scale, out=scaled[: len(some)])
                torch.softmax(scaled[: len(some)], 1, out=out)
            add(total, likely[:n], top, first)
            first += n
        return total

    def _top(self, n: int) -> tuple[Float[Tensor, "unit top"], Int[Tensor, "unit top"]]:
        """Each unit's largest activations, strongest first, and on which images.

        Of all but the first images only those are looked at that are stronger than the n-th so far.
        """
        best = where = torch.empty(0)
        first = 0
        for rows in self._store.batches(max(n, 1024), seed=None, columns=[self._site]):
            here = rows[self._site].float()
            if first == 0:
                values, images = here.T.contiguous(), torch.arange(len(here)).expand(here.shape[1], -1)
            else:
                values, images = _stronger(here, best[:, -1])
                values, images = torch.cat([best, values], 1), torch.cat([where, images + first], 1)
            best, kept = values.topk(min(n, values.shape[1]), 1)
            where, first = images.gather(1, kept), first + len(here)
        return best, where

    def _blocks(self) -> Iterable[tuple[Tensor, Tensor]]:
        for rows in self._store.batches(2048, seed=None, columns=[self._site, JUDGE]):
            yield rows[self._site].float(), rows[JUDGE].float()

    def _concepts(self) -> Iterable[Tensor]:
        return tqdm(self._texts.split(_CONCEPTS), desc="concepts", disable=not self._progress, leave=False)


def _stronger(
    here: Float[Tensor, "image unit"], than: Float[Tensor, " unit"]
) -> tuple[Float[Tensor, "unit some"], Int[Tensor, "unit some"]]:
    """Each unit's values above a bound of its own, and their images; -inf where it has fewer than others."""
    images, units = (here > than).nonzero(as_tuple=True)
    order = units.argsort(stable=True)
    images, units = images[order], units[order]
    counts = units.bincount(minlength=len(than))
    place = torch.arange(len(units)) - (counts.cumsum(0) - counts)[units]
    values = here.new_full((len(than), int(counts.max())), float("-inf"))
    where = torch.zeros(values.shape, dtype=torch.int64)
    values[units, place] = here[images, units]
    where[units, place] = images
    return values, where


def _probe(
    units: Sequence[Units], batch: tuple[Mapping[str, Any], Sequence[Any]], judge: Model, pool: Pool
) -> dict[str, Tensor]:
    inputs, pictures = batch
    activations = {u.site: u.pooled(inputs, pool).cpu() for u in units}
    seen = embed(judge, list(pictures), "vision", batch_size=len(pictures)).cpu()
    return {**activations, JUDGE: unit(seen)}


def _models_of(units: Sequence[Units]) -> dict[str, Model]:
    """One model, or that of each site where there are several."""
    if all(u.model is units[0].model for u in units):
        return {"model": units[0].model}
    return {f"model of {u.site}": u.model for u in units}


def _columns_of(folder: Path) -> dict[str, Column] | None:
    """Those of the store that is there already, if one is."""
    return Store(folder, partial=True).columns if (folder / "manifest.json").is_file() else None


def embed_concepts(
    judge: Model, names: Sequence[str], template: str = "{}"
) -> Float[Tensor, "concept width"]:
    """The judge's unit embedding of each name, put into a template like "a photo of {}"."""
    return unit(embed(judge, [template.format(name) for name in names], "text", batch_size=256).cpu())
