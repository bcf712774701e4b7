"""The same probes where the rows of a place do not fit in memory: their loss is summed a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from methods_multimodal.core.generators import generator
from methods_multimodal.probing.classifiers import STRENGTHS, Head, Probe, check_head, fit_probe
from methods_multimodal.probing.features import Features, Place
from mm_adapters import InputError

# scikit-learn copies what it fits, in float64; a place of more is fitted a part at a time.
MOST_BYTES = 2**30
# Rows in order, from the first to the last; called anew for every pass.
Parts = Callable[[], Iterator[Float[Tensor, "row width"]]]
_HIDDEN, _PASSES = 64, 200


def fit_streamed(
    parts: Parts,
    ids: Int[np.ndarray, " row"],
    *,
    train: Int[Tensor, " train"],
    validation: Int[Tensor, " validation"] | None = None,
    head: Head = "linear",
    strengths: Sequence[float] = STRENGTHS,
    n_classes: int | None = None,
    seed: int = 0,
) -> Probe:
    """As `fit_probe`, to the same minimum, holding one part of the rows at a time.

    L-BFGS, each of whose steps sums the loss and its gradient over a pass; 200 passes at most for a strength.
    """
    check_head(head, strengths)
    if validation is None and len(strengths) != 1:
        raise InputError(
            f"Without validation rows nothing chooses among {len(strengths)} strengths. Give one."
        )
    n_classes = n_classes or int(ids.max()) + 1
    targets = torch.from_numpy(ids)
    is_train = torch.zeros(len(ids), dtype=torch.bool).index_fill(0, train, True)
    centre, scale = _moments(parts, is_train)
    best: Probe | None = None
    for strength in sorted(strengths):
        layers = _minimise(parts, targets, is_train, centre, scale, head, strength, n_classes, seed)
        probe = Probe(layers, centre, scale, float(strength), float("nan"))
        if validation is not None:
            right = predict_streamed(parts, probe)[validation] == targets[validation]
            probe = Probe(layers, centre, scale, float(strength), float(right.double().mean()))
        if best is None or probe.validation > best.validation:
            best = probe
    assert best is not None
    return best


def predict_streamed(parts: Parts, probe: Probe) -> Int[Tensor, " row"]:
    """The likeliest class of every row."""
    return torch.cat([probe.predict(rows) for rows in parts()])


class PlaceRows:
    """The rows of one place: in memory, or a part at a time if there are more than that should hold."""

    def __init__(self, features: Features, place: Place) -> None:
        self._parts = partial(features.parts, place)
        self._whole = features.at(place) if features.n_bytes(place) <= MOST_BYTES else None

    def fit(self, ids: Int[np.ndarray, " row"], **options: Any) -> Probe:
        """The probe of these classes; options as of `fit_probe`."""
        if self._whole is None:
            return fit_streamed(self._parts, ids, **options)
        return fit_probe(self._whole, ids, **options)

    def predict(self, probe: Probe, which: Int[Tensor, " some"]) -> Int[Tensor, " some"]:
        """The likeliest class of some rows."""
        if self._whole is None:
            return predict_streamed(self._parts, probe)[which]
        return probe.predict(self._whole[which])


def _chosen(parts: Parts, which: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each part the chosen rows, in float64, and which rows of all they are."""
    first = 0
    for rows in parts():
        own = which[first : first + len(rows)].nonzero().flatten()
        if len(own):
            yield rows[own].double().cpu(), own + first
        first += len(rows)


def _moments(parts: Parts, which: Tensor) -> tuple[Tensor, Tensor]:
    n, total = 0, torch.zeros(1, dtype=torch.float64)
    for rows, _ in _chosen(parts, which):
        if not bool(torch.isfinite(rows).all()):
            raise InputError(
                "The rows hold NaN or infinity. Look at the model's values before they are probed."
            )
        n, total = n + len(rows), total + rows.sum(0)
    centre = total / n
    squares = torch.zeros(1, dtype=torch.float64)
    for rows, _ in _chosen(parts, which):
        squares = squares + (rows - centre).square().sum(0)
    scale = (squares / n).sqrt()
    return centre, torch.where(scale > 1e-12, scale, torch.ones_like(scale))


def _minimise(
    parts: Parts,
    targets: Tensor,
    which: Tensor,
    centre: Tensor,
    scale: Tensor,
    head: Head,
    strength: float,
    n_classes: int,
    seed: int,
) -> dict[str, Tensor]:
    sizes = [len(centre), n_classes] if head == "linear" else [len(centre), _HIDDEN, n_classes]
    rng = generator(seed)
    layers: dict[str, Tensor] = {}
    for i, (a, b) in enumerate(pairwise(sizes)):
        start = torch.zeros(a, b) if head == "linear" else torch.randn(a, b, generator=rng) / a**0.5
        layers |= {
            f"weight{i}": start.double().requires_grad_(),
            f"bias{i}": torch.zeros(b).double().requires_grad_(),
        }
    # scikit-learn has one vector for two classes, the difference of ours, whose penalty is half of ours.
    halves = 2.0 if n_classes == 2 and head == "linear" else 1.0
    search = torch.optim.LBFGS(
        list(layers.values()),
        max_iter=_PASSES,
        max_eval=_PASSES,
        tolerance_grad=1e-6 * int(which.sum()),
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        search.zero_grad()
        weights = [value for name, value in layers.items() if name.startswith("weight")]
        total = halves / (2 * strength) * torch.stack([w.square().sum() for w in weights]).sum()
        total.backward()
        total = total.detach()
        for rows, numbers in _chosen(parts, which):
            logits = Probe(layers, centre, scale, strength, 0.0).logits(rows)
            part = cross_entropy(logits, targets[numbers], reduction="sum")
            part.backward()
            total = total + part.detach()
        return total

    search.step(loss)
    return {name: value.detach() for name, value in layers.items()}
