"""How much of a prediction the words carry, and how much the picture, by Shapley values of their tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.copies import can_be_copied, copied
from methods_multimodal.core.kept import kept
from methods_multimodal.core.outputs import contrast_of, vocabulary_logits
from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.probing.players import Player, hide, players_of
from mm_adapters import InputError, Model

Metric = Callable[[Any], Tensor]
_MOST_EXACT = 12


@dataclass(frozen=True)
class ModalityShares(Record):
    """Each token's Shapley value for the metric of each input; `error` is its standard error (0: exact).

    `item[player]` is the input that a player is of, `is_text` whether it is a word; else a square of the
    picture. `full` is the metric with all tokens shown, `empty` with none: the values of an input sum to
    their difference.
    """

    values: Float[Tensor, " player"]
    error: Float[Tensor, " player"]
    item: Int[Tensor, " player"]
    is_text: Bool[Tensor, " player"]
    full: Float[Tensor, " item"]
    empty: Float[Tensor, " item"]
    names: tuple[str, ...]

    @property
    def text_share(self) -> Float[Tensor, " item"]:
        """The words' part of the sum of absolute values, for each input; the picture has the rest."""
        return self._per_item(self.values.abs(), self.is_text) / self._per_item(self.values.abs())

    @property
    def text_players(self) -> Float[Tensor, " item"]:
        """The words' part of the number of players: their share if all tokens mattered alike."""
        ones = torch.ones_like(self.values)
        return self._per_item(ones, self.is_text) / self._per_item(ones)

    @property
    def estimate(self) -> Estimate:
        """The mean share of the words, over inputs."""
        return bootstrap(self.text_share[:, None], n_resamples=2000)

    def of(self, item: int) -> tuple[tuple[str, ...], Float[Tensor, " player"]]:
        """The players of one input, and their values."""
        own = (self.item == item).nonzero().flatten().tolist()
        return tuple(self.names[i] for i in own), self.values[own]

    def _per_item(self, values: Tensor, which: Tensor | None = None) -> Float[Tensor, " item"]:
        kept_values = values.double() if which is None else values.double() * which
        return torch.zeros(len(self.full), dtype=torch.float64).index_add(0, self.item, kept_values)


def modality_shares(
    model: Model,
    items: Sequence[Mapping[str, Any]],
    *,
    metric: Metric | None = None,
    n_orders: int | None = 16,
    side: int | None = None,
    batch: int = 64,
    seed: int = 0,
    folder: str | Path | None = None,
) -> ModalityShares:
    """Shares a prediction out among words and squares of the picture.

    A token that is hidden is a zero vector where the first block begins. Each order of the players shows them
    one after the other, and a second one in reverse; what the metric gains is the player's.

    Args:
        items: Inputs of one row each: a picture and a text.
        metric: One number for each row of the model's output (None: of a contrastive model the pair's logit,
            of a VLM the logit of the token that it likes best when it sees all).
        n_orders: How many orders, in pairs (None: every subset, of at most 12 players).
        side: The picture is cut into side x side squares (None: at least as many as there are words).
        batch: The most copies of an input in one run.
        seed: Of the orders.
        folder: Where inputs are written down as they are done, so that a call that was killed goes on.

    Source: Parcalabescu and Frank 2023, arXiv 2212.08158, equations 1 to 4; Castro et al. 2009 (sampling).
    Raises: MissingSiteError if the model has no words or no patches; InputError for an input of several rows,
        an odd number of orders, or too many players for all subsets.
    """
    if not items or (n_orders is not None and (n_orders < 2 or n_orders % 2)):
        raise InputError(f"{len(items)} inputs, n_orders={n_orders}: give inputs, and orders in pairs.")
    ready = [_prepared(model, item) for item in items]
    players = [players_of(model, item, side) for item in ready]
    most = max(map(len, players))
    if n_orders is None and most > _MOST_EXACT:
        raise InputError(f"{most} players have {2**most} subsets. Give n_orders, or a smaller `side`.")
    per_run = batch if can_be_copied(model) else 1
    settings: dict[str, Any] = {"metric": metric, "n_orders": n_orders, "side": side, "rows": per_run}
    made_of: dict[str, Any] = {"models": {"model": model}, "data": ready, "seed": seed, **settings}
    parts: list[dict[str, Tensor]] = []
    with kept(folder, job="modality_shares", **made_of) as work:
        bar = tqdm(ready, desc="sharing out", unit="input", disable=None, leave=False)
        for i, (item, own) in enumerate(zip(bar, players, strict=True)):
            rng = np.random.default_rng([seed, i])
            call = partial(_one, model, item, own, metric, n_orders, per_run, rng)
            parts.append(work.tensors(f"item{i}", call))
    return ModalityShares(
        values=torch.cat([part["values"] for part in parts]),
        error=torch.cat([part["error"] for part in parts]),
        item=torch.cat([torch.full((len(own),), i) for i, own in enumerate(players)]),
        is_text=torch.tensor([player.is_text for own in players for player in own]),
        full=torch.cat([part["full"] for part in parts]),
        empty=torch.cat([part["empty"] for part in parts]),
        names=tuple(player.name for own in players for player in own),
    )


def _one(
    model: Model,
    item: Mapping[str, Any],
    players: Sequence[Player],
    metric: Metric | None,
    n_orders: int | None,
    per_run: int,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """The values of one input's players."""
    metric = _own_metric(model, item) if metric is None else metric
    n = len(players)
    if n_orders is None:
        subsets = torch.tensor([[bool(i >> p & 1) for p in range(n)] for i in range(2**n)])
        scores = _scores(model, item, players, metric, subsets, per_run)
        values, error = shapley(scores), torch.zeros(n, dtype=torch.float64)
        return {"values": values, "error": error, "full": scores[-1:], "empty": scores[:1]}
    orders = [rng.permutation(n) for _ in range(n_orders // 2)]
    orders = torch.from_numpy(np.stack([one for order in orders for one in (order, order[::-1])]))
    # Row k of an order shows its first k players.
    ranks = orders.argsort(1)
    shown = ranks[:, None] < torch.arange(n + 1)[:, None]
    subsets, back = torch.unique(shown.flatten(0, 1), dim=0, return_inverse=True)
    scores = _scores(model, item, players, metric, subsets, per_run)[back].reshape(n_orders, n + 1)
    gains = scores.diff(dim=1).gather(1, ranks)
    pairs = gains.reshape(n_orders // 2, 2, n).mean(1)
    spread = pairs.std(0) if len(pairs) > 1 else torch.zeros(n, dtype=torch.float64)
    return {
        "values": gains.mean(0),
        "error": spread / math.sqrt(len(pairs)),
        "full": scores[0, -1:],
        "empty": scores[0, :1],
    }


def shapley(scores: Float[Tensor, " subset"]) -> Float[Tensor, " player"]:
    """Shapley values from the score of every subset; player p is in subset i if bit p of i is set."""
    n = len(scores).bit_length() - 1
    values = torch.zeros(n, dtype=torch.float64)
    for p in range(n):
        others = [q for q in range(n) if q != p]
        for size in range(n):
            weight = 1 / (n * math.comb(n - 1, size))
            for subset in combinations(others, size):
                without = sum(1 << q for q in subset)
                values[p] += weight * (scores[without | 1 << p] - scores[without])
    return values


def _scores(
    model: Model,
    item: Mapping[str, Any],
    players: Sequence[Player],
    metric: Metric,
    subsets: Bool[Tensor, "subset player"],
    per_run: int,
) -> Float[Tensor, " subset"]:
    parts = []
    for shown in subsets.split(per_run):
        output = model.run(copied(item, len(shown)), edit=hide(players, shown)).output
        scores = metric(output).detach().double().cpu()
        if scores.shape != (len(shown),):
            raise InputError(
                f"The metric gave {tuple(scores.shape)} for {len(shown)} rows; it is a number a row."
            )
        parts.append(scores)
    return torch.cat(parts)


def _own_metric(model: Model, item: Mapping[str, Any]) -> Metric:
    if model.kind == "contrastive":
        return lambda output: contrast_of(output).logits.diagonal()
    last = int(model.row_positions(item, -1)[0])
    best = int(vocabulary_logits(model, model.run(item).output)[0, last].argmax())
    return lambda output: vocabulary_logits(model, output)[:, last, best]


def _prepared(model: Model, item: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own arguments; raw pictures and texts are made such."""
    raw = {k: v for k, v in item.items() if k in ("text", "images") and not isinstance(v, Tensor)}
    return {**{k: v for k, v in item.items() if k not in raw}, **(model.prepare(**raw) if raw else {})}
