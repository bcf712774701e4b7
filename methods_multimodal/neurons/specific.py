"""Which neurons are active for one domain or one modality, and silent for the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.model import check_sites
from methods_multimodal.core.record import Record
from methods_multimodal.neurons.places import Neuron, mlp_sites
from mm_adapters import InputError, Model, Read

# What is read of each domain's positions.
MEASURES = ("rate", "mean", "size", "largest")
# Inputs, and at which of their positions [row, pos] neurons are looked at (None: all).
Batch = tuple[Mapping[str, Any], Bool[Tensor, "_ _"] | None]


@dataclass(frozen=True)
class NeuronActivity(Record):
    """How active each neuron is over each domain's positions.

    `rate` is the share of positions where it is above the threshold, `mean` its mean, `size` the mean of its
    size, `largest` its maximum; `n` how many positions were seen.
    """

    rate: Float[Tensor, "domain layer neuron"]
    mean: Float[Tensor, "domain layer neuron"]
    size: Float[Tensor, "domain layer neuron"]
    largest: Float[Tensor, "domain layer neuron"]
    n: tuple[int, ...]
    domains: tuple[str, ...]
    layers: tuple[int, ...]
    tower: str

    def shares(self, measure: str = "rate") -> Float[Tensor, "domain layer neuron"]:
        """Each domain's part of a measure, one in sum over domains; even for a neuron that is never active.

        Raises: InputError for a measure that there is not.
        """
        if measure not in MEASURES:
            raise InputError(f"measure={measure!r}: there is {', '.join(MEASURES)}.")
        value = getattr(self, measure).clamp_min(0)
        total = value.sum(0)
        even = torch.full_like(value, 1 / len(self.domains))
        return torch.where(total > 0, value / total.clamp_min(1e-30), even)

    def entropy(self, measure: str = "rate") -> Float[Tensor, "layer neuron"]:
        """The entropy of the shares, in nats: zero if one domain has all, log(domains) if all are alike.

        Source: Huo et al. 2024, arXiv 2406.11193, equations 2 and 3 (domain activation probability entropy).
        """
        return torch.special.entr(self.shares(measure)).sum(0)

    def specific(
        self, share: float = 0.01, *, measure: str = "rate", active: float = 0.1
    ) -> dict[str, tuple[Neuron, ...]]:
        """By domain: the `share` of all neurons with the lowest entropy, each where its part is largest.

        Only neurons count that are active in more than `active` of the positions of some domain.

        Source: Huo et al. 2024, arXiv 2406.11193 (MMNeuron).
        Raises: InputError if no neuron is left.
        """
        entropy = self.entropy(measure).masked_fill(self.rate.amax(0) <= active, torch.inf).flatten()
        n = min(max(1, round(share * len(entropy))), int(entropy.isfinite().sum()))
        if not n:
            raise InputError(
                f"No neuron is active in more than {active:.0%} of a domain's positions; lower active=."
            )
        return self._by_domain(entropy.argsort()[:n].tolist(), self.shares(measure).argmax(0).flatten())

    def important(self, n: int, *, measures: Sequence[str] = MEASURES) -> dict[str, tuple[Neuron, ...]]:
        """By domain its `n` most important neurons: by the mean rank, over measures, of its part of each.

        Source: Huang et al. 2024, arXiv 2410.04819 (MINER: importance by several measures, gathered).
        Raises: InputError for a measure that there is not, or more neurons than there are.
        """
        if not 1 <= n <= self.rate[0].numel() or not measures:
            raise InputError(
                f"n={n}: there are {self.rate[0].numel()} neurons, and {len(measures)} measures."
            )
        ranks = sum(self.shares(m).flatten(1).argsort(1).argsort(1).double() for m in measures)
        assert isinstance(ranks, Tensor)
        width = self.rate.shape[-1]
        return {
            domain: tuple(
                (self.layers[i // width], i % width) for i in ranks[d].argsort(descending=True)[:n].tolist()
            )
            for d, domain in enumerate(self.domains)
        }

    def _by_domain(self, order: list[int], domain_of: Tensor) -> dict[str, tuple[Neuron, ...]]:
        width, found = self.rate.shape[-1], {domain: [] for domain in self.domains}
        for i in order:
            found[self.domains[int(domain_of[i])]].append((self.layers[i // width], i % width))
        return {domain: tuple(neurons) for domain, neurons in found.items()}


def neuron_activity(
    model: Model,
    domains: Mapping[str, Iterable[Batch]],
    *,
    tower: str = "language",
    layers: Sequence[int] | None = None,
    above: float = 0.0,
) -> NeuronActivity:
    """Reads every neuron over each domain's batches, and keeps sums only.

    Domains are kinds of pictures or questions (domain-specific neurons), or the image and the text positions
    of the same inputs (modality-specific neurons).

    Args:
        model: What is run.
        domains: By name: batches of inputs, each with the positions that count (None: all).
        tower: Whose neurons.
        layers: Which layers (None: all).
        above: From which activation on a neuron is active.

    Raises: MissingSiteError for a layer without neurons; InputError for fewer than two domains, one without
        positions, or a mask that does not fit.
    """
    if len(domains) < 2:
        raise InputError(
            f"What is specific shows beside another domain; there is {', '.join(domains) or 'none'}."
        )
    chosen = mlp_sites(model, tower, layers)
    check_sites(model, chosen.values())
    sums: dict[str, list[Tensor]] = {measure: [] for measure in MEASURES}
    counts = []
    for name, batches in domains.items():
        total: dict[str, Tensor] = {}
        n = 0
        for inputs, where in tqdm(batches, desc=name, unit="batch", disable=None, leave=False):
            reads = [Read(s, reduce=_summed(s, where, above)) for s in chosen.values()]
            run = model.run(inputs, read=reads)
            part = torch.stack([run[s] for s in chosen.values()], 1)  # [measure or count, layer, neuron]
            n += int(part[len(MEASURES), 0, 0])
            for i, measure in enumerate(MEASURES):
                join = torch.maximum if measure == "largest" else torch.add
                total[measure] = join(total[measure], part[i]) if measure in total else part[i]
        if not n:
            raise InputError(f"The domain {name!r} has no position. Give batches with some.")
        counts.append(n)
        for measure in MEASURES:
            sums[measure].append(total[measure] if measure == "largest" else total[measure] / n)
    means = {measure: torch.stack(of) for measure, of in sums.items()}
    return NeuronActivity(**means, n=tuple(counts), domains=tuple(domains), layers=tuple(chosen), tower=tower)


def _summed(site: str, where: Tensor | None, above: float) -> Any:
    """[measure or count, neuron]: what is added up over one batch's positions."""

    def fold(value: Tensor) -> Tensor:
        if where is not None and tuple(where.shape) != tuple(value.shape[:2]):
            raise InputError(
                f"{site} is {list(value.shape)}; the mask of its positions is {list(where.shape)}."
            )
        active = value.float().flatten(0, 1) if where is None else value.float()[where.to(value.device)]
        if not len(active):
            return active.new_zeros(len(MEASURES) + 1, value.shape[-1])
        rows = ((active > above).float().sum(0), active.sum(0), active.abs().sum(0), active.amax(0))
        return torch.stack([*rows, torch.full_like(rows[0], len(active))])

    return fold
