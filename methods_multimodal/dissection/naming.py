"""CLIP-Dissect over a store of activations: streamed over images and concepts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from methods_multimodal._record import Record
from methods_multimodal.dissection import similarity as kernels
from methods_multimodal.dissection.units import Pool, Units
from mm_adapters import HookedModel, InputError, StoreError
from mm_adapters.store import Column, Store, Writer

JUDGE = "judge"
# A shard closes when it is this large.
SHARD_BYTES = 32 * 2**20
# Concepts whose similarities to every image are in memory at once.
_CONCEPTS = 512


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
    judge: HookedModel,
    folder: str | Path,
    *,
    pool: Pool = "mean",
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Store:
    """Every unit's activation on every picture, and the judge's embedding of it, in one pass, on disk.

    A batch is the model's inputs and the pictures that they are, or make. Killed and started again with
    the same arguments, it goes on where it was and ends with the same store.

    Raises: StoreError if the folder holds another store.
    """
    if not batches:
        raise InputError("There are no pictures to probe with.")
    known = {
        "sites": [u.site for u in units],
        "families": [u.model.sitemap.family for u in units],
        "judge": judge.sitemap.family,
        "pool": pool,
        "n_batches": len(batches),
        **(about or {}),
    }
    finished = _finished(Path(folder), known)
    if finished is not None:
        return finished
    first = _probe(units, batches[0], judge, pool)
    columns = {name: Column(tuple(v.shape[1:]), torch.float32) for name, v in first.items()}
    with Writer(folder, columns, known, shard_bytes=SHARD_BYTES) as writer:
        rest = batches[writer.appends :]
        bar = tqdm(rest, initial=writer.appends, total=len(batches), desc="probing", disable=not progress)
        for batch in bar:
            rows = first if batch is batches[0] else _probe(units, batch, judge, pool)
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

    `texts` are the judge's unit embeddings of the concepts. The similarities [image, concept] are
    never in memory together: soft_wpmi and wpmi hold the embeddings of the units' top images, cosine
    only sums, the others a block. `options` are the kernel's own.

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

    def soft_wpmi(self, top_k: int = 100, scale: float = 10.0, **options: Any) -> Tensor:
        return self._by_top(kernels.soft_wpmi, top_k, scale, **options)

    def wpmi(self, top_k: int = 28, scale: float = 2.0, **options: Any) -> Tensor:
        return self._by_top(kernels.wpmi, top_k, scale, **options)

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
        n_top = int(len(self._store) * top_share)
        if n_top < 2:
            raise InputError(f"The top {top_share:.0%} of {len(self._store)} images are {n_top}: too few.")
        values, top = self._top(n_top)
        seen = self._store.rows(columns=[JUDGE])[JUDGE]
        out = []
        for own, images in zip(values, top, strict=True):
            similarity = seen[images] @ self._texts.T
            out.append(kernels.rank_reorder(similarity, own[:, None], top_share=1.0, **options)[0])
        return torch.stack(out)

    def _by_top(self, kernel: Callable[..., Tensor], top_k: int, scale: float, **options: Any) -> Tensor:
        if top_k > len(self._store):
            raise InputError(
                f"The top {top_k} of {len(self._store)} images were asked for. "
                "Give more images, or a smaller top_k."
            )
        _, top = self._top(top_k)
        used, compact = top.unique(return_inverse=True)
        seen = self._store.rows(columns=[JUDGE])[JUDGE][used]
        normaliser = seen.new_full((len(seen),), float("-inf"))
        for texts in self._concepts():
            block = torch.addmm(seen.new_zeros(1), seen, texts.T, beta=0, alpha=scale)
            normaliser = torch.logaddexp(normaliser, block.exp_().sum(1).log_())
        parts = []
        for texts in self._concepts():
            parts.append(kernel(seen @ texts.T, compact, scale=scale, normaliser=normaliser, **options))
        return torch.cat(parts, 1)

    def _top(self, n: int) -> tuple[Float[Tensor, "unit top"], Int[Tensor, "unit top"]]:
        """Each unit's largest activations, and on which images."""
        best: Tensor | None = None
        where: Tensor | None = None
        first = 0
        for a, _ in self._blocks():
            rows = torch.arange(first, first + len(a))[:, None].expand_as(a)
            first += len(a)
            best = a if best is None else torch.cat([best, a])
            where = rows if where is None else torch.cat([where, rows])
            best, order = best.topk(min(n, len(best)), 0)
            where = where.gather(0, order)
        assert best is not None
        assert where is not None
        return best.T.contiguous(), where.T.contiguous()

    def _blocks(self) -> Iterable[tuple[Tensor, Tensor]]:
        for rows in self._store.batches(2048, seed=None, columns=[self._site, JUDGE]):
            yield rows[self._site].float(), rows[JUDGE].float()

    def _concepts(self) -> Iterable[Tensor]:
        return tqdm(self._texts.split(_CONCEPTS), desc="concepts", disable=not self._progress, leave=False)


def _probe(
    units: Sequence[Units], batch: tuple[Mapping[str, Any], Sequence[Any]], judge: HookedModel, pool: Pool
) -> dict[str, Tensor]:
    inputs, pictures = batch
    found = {u.site: u.pooled(inputs, pool).cpu() for u in units}
    with torch.no_grad():
        seen = judge.embed(images=list(pictures)).float().cpu()
    return {**found, JUDGE: torch.nn.functional.normalize(seen, dim=-1)}


def _finished(folder: Path, known: Mapping[str, Any]) -> Store | None:
    """The store, if it is there and whole and of the same things."""
    try:
        store = Store(folder)
    except StoreError:
        return None
    return store if store.about == known else None


@torch.no_grad()
def embed_concepts(
    judge: HookedModel, names: Sequence[str], template: str = "{}"
) -> Float[Tensor, "concept width"]:
    """The judge's unit embedding of each name, put into a template like "a photo of {}"."""
    parts = [
        judge.embed(text=[template.format(name) for name in names[i : i + 256]])
        for i in range(0, len(names), 256)
    ]
    return torch.nn.functional.normalize(torch.cat(parts).float().cpu(), dim=-1)
