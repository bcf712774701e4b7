"""What the first token of an answer tells beyond the answer: its logits as features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from methods_multimodal.core.positions import in_rows
from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import paired_interval
from methods_multimodal.lenses._entries import stream_sites
from mm_adapters import InputError, Model


@dataclass(frozen=True)
class Separation(Record):
    """How well scores tell two kinds of held-out rows apart; 0.5 is chance.

    `null` are the AUROCs of the same with the training labels shuffled; the interval is over the rows.
    """

    scores: Float[Tensor, " row"]
    positive: Bool[Tensor, " row"]
    auroc: float
    low: float
    high: float
    null: Float[Tensor, " draw"]


def first_token_logits(
    model: Model, batches: Iterable[Mapping[str, Any]], *, tower: str = "language"
) -> Float[Tensor, "row token"]:
    """The logits with which each row's answer begins: those at its last attended position.

    Source: Zhao et al. 2024, arXiv 2403.09037
    Raises: MissingSiteError if the tower has no unembedding, or no one stream.
    """
    view = model.check_tower(tower)
    _ = view.unembedding
    stream_sites(model, view)
    rows = []
    for batch in batches:
        at = in_rows(model, batch, -1, tower)
        rows.append(at.of(view.vocabulary_logits(model.run(batch).output)).detach().float().cpu())
    return torch.cat(rows)


def separate(
    training: Float[Tensor, "row feature"],
    labels: Bool[Tensor, " row"],
    validation: Float[Tensor, "other feature"],
    validation_labels: Bool[Tensor, " other"],
    test: Float[Tensor, "held feature"],
    test_labels: Bool[Tensor, " held"],
    *,
    strengths: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0),
    n_null: int = 20,
    seed: int = 0,
) -> Separation:
    """A logistic regression on features, its strength chosen on validation rows and judged on test rows.

    Args:
        training: Features of the rows that it is fitted on.
        labels: Which of those are positive.
        validation: Features of the rows that the strength is chosen on.
        validation_labels: Which of those are positive.
        test: Features of the rows that it is judged on.
        test_labels: Which of those are positive.
        strengths: The inverse strengths of regularisation that are tried (scikit-learn's C).
        n_null: How often it is fitted to shuffled labels.
        seed: Of the shuffling.

    Source: Zhao et al. 2024, arXiv 2403.09037 (linear probing of the first token's logits).
    Raises: InputError where only one kind of rows is there.
    """
    for name, kinds in (("training", labels), ("validation", validation_labels), ("test", test_labels)):
        if not 0 < int(kinds.sum()) < len(kinds):
            raise InputError(f"All {name} rows are of one kind: there is nothing to tell apart.")
    x, held, other = (t.double().cpu().numpy() for t in (training, test, validation))
    y, chosen_on, truth = (t.cpu().numpy() for t in (labels, validation_labels, test_labels))

    def fitted(y: Any) -> Pipeline:
        def fit(strength: float) -> Pipeline:
            probe = LogisticRegression(C=strength, max_iter=2000)
            return make_pipeline(StandardScaler(), probe).fit(x, y)

        return max(map(fit, strengths), key=lambda p: roc_auc_score(chosen_on, p.decision_function(other)))

    scores = fitted(y).decision_function(held)
    rng = np.random.default_rng(seed)
    null = [roc_auc_score(truth, fitted(rng.permutation(y)).decision_function(held)) for _ in range(n_null)]
    return separation(torch.from_numpy(scores), test_labels, torch.tensor(null))


def separation(
    scores: Float[Tensor, " row"], positive: Bool[Tensor, " row"], null: Float[Tensor, " draw"]
) -> Separation:
    """The AUROC of scores with its interval over rows, beside its null."""
    values, truth = scores.double().cpu().numpy(), positive.cpu().numpy().astype(float)

    def auroc(values: Any, truth: Any, axis: int = -1) -> Any:
        ranks = rankdata(values, axis=axis)
        n_with = truth.sum(axis)
        above = (ranks * truth).sum(axis) - n_with * (n_with + 1) / 2
        # A resample of one kind only is 0 / 0, which is left out.
        return np.asarray(above / (n_with * (truth.shape[axis] - n_with)))

    low, high = paired_interval(auroc, values, truth, n_resamples=2000)
    return Separation(
        scores=scores.float(),
        positive=positive,
        auroc=float(auroc(values, truth)),
        low=float(low),
        high=float(high),
        null=null.float(),
    )
