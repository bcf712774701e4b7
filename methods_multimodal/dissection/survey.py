"""Everything that is asked of one site in one go: names by each method, chance, and held-out checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from methods_multimodal.core.statistics import correlation
from methods_multimodal.dissection.concepts import Concepts, Masks, presence, shares
from methods_multimodal.dissection.naming import JUDGE, clip_dissect, collect, embed_concepts
from methods_multimodal.dissection.network import NetworkDissection, active_places, network_dissection
from methods_multimodal.dissection.scores import (
    Chance,
    Faithfulness,
    cell_iou,
    chance,
    faithfulness,
)
from methods_multimodal.dissection.similarity import KERNELS, cosine
from methods_multimodal.dissection.units import Units
from mm_adapters import InputError, Model
from mm_adapters.store import Store

# Enough for a null distribution, few enough to hold.
_SHUFFLED_IMAGES = 400
# The share of units with random weights that may reach a score that counts.
LEVEL = 0.01


@dataclass(frozen=True)
class Named:
    """One method's names for the units: the best concept, its score, chance, and the held-out check.

    `faithful` is None where there are no masks to say what the held-out pictures show;
    `follows[unit]` is then the only check: the correlation of activation and similarity there.
    """

    method: str
    names: tuple[str, ...]
    scores: Float[Tensor, " unit"]
    chance: Chance
    faithful: Faithfulness | None
    follows: Float[Tensor, " unit"]


@dataclass(frozen=True)
class Survey:
    """What was found out about a site. `top[unit]` are the pictures it is strongest on, by number.

    `twins` is the same of the same site with other weights, such as random ones: what the counts are there.
    """

    site: str
    concepts: Concepts
    methods: tuple[Named, ...]
    activations: Float[Tensor, "image unit"]
    top: Int[Tensor, "unit top"]
    network: NetworkDissection | None
    twins: tuple[Survey, ...] = ()

    def by_name(self, method: str) -> Named:
        """One method's names. Raises: InputError if it was not asked."""
        for one in self.methods:
            if one.method == method:
                return one
        known = ", ".join(one.method for one in self.methods)
        raise InputError(f"No method {method!r} was asked; there is {known}.")

    def random_threshold(self, method: str, level: float = LEVEL) -> float:
        """The score that a share of at most `level` of the twins' units is above.

        Raises: InputError without twins.
        """
        if not self.twins:
            raise InputError("There are no twins to compare with. Pass survey(twins=...).")
        scores = torch.cat([twin.by_name(method).scores for twin in self.twins])
        return float(scores.double().quantile(1 - level, interpolation="higher"))

    def above_random(self, method: str, level: float = LEVEL) -> list[int]:
        """The units whose best score is above `random_threshold`."""
        above = self.by_name(method).scores.double() > self.random_threshold(method, level)
        return above.nonzero().flatten().tolist()


def survey(
    units: Units,
    batches: Sequence[tuple[Mapping[str, Any], Sequence[Any]]],
    judge: Model,
    concepts: Concepts,
    folder: str | Path,
    *,
    masks: Sequence[Masks] | None = None,
    texts: Sequence[str] | None = None,
    template: str = "{}",
    kernels: Sequence[str] = ("soft_wpmi", "cosine"),
    held_out: float = 0.3,
    share: float = 0.005,
    n_shuffles: int = 99,
    about: Mapping[str, Any] | None = None,
    twins: Sequence[Units] = (),
    progress: bool = True,
) -> Survey:
    """Names every unit of a site by network dissection, where there are masks, and by CLIP-Dissect.

    Activations are kept in the folder, so that a killed run goes on.

    Args:
        units: The units of one site.
        batches: Of each batch the model's inputs, and the pictures that they are, or make.
        judge: The contrastive model that sees the pictures.
        concepts: The names that units can get.
        folder: Where the activations are kept.
        masks: What each picture shows; without them there is no network dissection.
        texts: The concepts' captions; without them, each concept's name in the template.
        template: What a name is put into, such as "a photo of {}".
        kernels: The kernels of CLIP-Dissect.
        held_out: The share of the batches, the last ones, that check the names instead of giving them.
        share: The share of all places at which a unit exceeds its threshold.
        n_shuffles: How often pictures are shuffled to say what chance reaches.
        about: What else the stores should say that they were made of.
        twins: Units of the same site of models with other weights (`twins_of`), of which everything is
            asked as well.
        progress: Whether to show progress bars.

    Raises: InputError for unknown kernels, too few batches, or twins of another site, before anything runs.
    """
    unknown = [k for k in kernels if k not in KERNELS]
    if unknown:
        raise InputError(f"No kernel {', '.join(unknown)}; there is {', '.join(KERNELS)}.")
    n_check = max(1, round(held_out * len(batches)))
    if len(batches) - n_check < 1:
        raise InputError("One batch names the units and another checks the names: give more pictures.")
    if others := [twin.site for twin in twins if twin.site != units.site]:
        raise InputError(f"A twin is of {others[0]}, and the units are of {units.site}. Give the same site.")
    named, check = batches[:-n_check], batches[-n_check:]
    store = collect([units], named, judge, Path(folder) / "named", about=about, progress=progress)
    other = collect([units], check, judge, Path(folder) / "check", about=about, progress=progress)
    captions = embed_concepts(judge, texts or concepts.names, "{}" if texts else template)
    first, held = _columns(store, units.site), _columns(other, units.site)
    n_named = len(first[0])
    shown = None if masks is None else presence(masks[n_named:], concepts)

    by_method: list[Named] = []
    network = None
    if masks is not None:
        network = network_dissection(
            units, [b for b, _ in named], masks[:n_named], concepts, share=share, progress=progress
        )
        names = tuple(name for name, _ in network.best())
        null = _network_chance(units, named, masks, concepts, network, n_shuffles)
        by_method.append(_named("network", names, network.iou.amax(1), null, held, captions, shown, concepts))
    null = chance(
        lambda order: cosine((first[1] @ captions.T)[order], first[0]), n_named, n_shuffles=n_shuffles
    )
    for kernel in kernels:
        options = {} if kernel != "soft_wpmi" else {"top_k": min(100, max(2, n_named // 5))}
        options = {"top_k": min(28, max(2, n_named // 5))} if kernel == "wpmi" else options
        by_kernel = clip_dissect(
            store, units.site, captions, concepts.names, kernel=kernel, progress=progress, **options
        )
        names = tuple(name for (name,) in by_kernel.best())
        by_method.append(
            _named(kernel, names, by_kernel.scores.amax(1), null, held, captions, shown, concepts)
        )
    top = first[0].topk(min(8, n_named), 0).indices.T
    of_twins = tuple(
        survey(
            twin,
            batches,
            judge,
            concepts,
            Path(folder) / f"twin{number}",
            masks=masks,
            texts=texts,
            template=template,
            kernels=kernels,
            held_out=held_out,
            share=share,
            n_shuffles=n_shuffles,
            about=about,
            progress=progress,
        )
        for number, twin in enumerate(twins)
    )
    return Survey(units.site, concepts, tuple(by_method), first[0], top, network, of_twins)


def _columns(store: Store, site: str) -> tuple[Tensor, Tensor]:
    rows = store.rows(columns=[site, JUDGE])
    return rows[site].float(), rows[JUDGE].float()


def _named(
    method: str,
    names: tuple[str, ...],
    scores: Tensor,
    null: Chance,
    held: tuple[Tensor, Tensor],
    captions: Tensor,
    shown: Tensor | None,
    concepts: Concepts,
) -> Named:
    faithful = None if shown is None else faithfulness(names, held[0], shown, concepts.names)
    table = correlation(held[0], held[1] @ captions.T)
    follows = torch.stack([table[unit, concepts.index(name)] for unit, name in enumerate(names)])
    return Named(method, names, scores, null, faithful, follows)


def _network_chance(
    units: Units,
    batches: Sequence[tuple[Mapping[str, Any], Sequence[Any]]],
    masks: Sequence[Masks],
    concepts: Concepts,
    network: NetworkDissection,
    n_shuffles: int,
) -> Chance:
    """Chance for IoUs, on the units' own grid and at most so many pictures."""
    parts: list[Tensor] = []
    n = 0
    for inputs, _ in batches:
        if n >= _SHUFFLED_IMAGES:
            break
        parts.append(active_places(units.maps(inputs).cpu(), network.thresholds.cpu()))
        n += len(parts[-1])
    active = torch.cat(parts)
    down, across = int(active.shape[2]), int(active.shape[3])
    covered = shares(masks[: len(active)], concepts, (down, across))
    return chance(cell_iou(active, covered), len(active), n_shuffles=n_shuffles)
