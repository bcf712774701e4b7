"""How unusual the way is on which a model comes to its answer, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from sklearn.covariance import LedoitWolf
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.lenses.reading import LensReading
from mm_adapters import InputError

Detector = Literal["mahalanobis", "neighbours", "forest"]
DETECTORS: tuple[Detector, ...] = ("mahalanobis", "neighbours", "forest")


@dataclass(frozen=True)
class AnomalyScores(Record):
    """How far each entry is from the normal ones (larger: more unusual), by one detector."""

    scores: Float[Tensor, " entry"]
    detector: str


def trajectory(reading: LensReading) -> Float[Tensor, "entry feature"]:
    """What happens on the way to an answer, three numbers a layer, the last layer's own among them.

    The log-probability of the answer (the last layer's strongest candidate), the entropy, and the divergence
    of the last layer's distribution from the layer's; the last layer has no divergence.

    Raises: InputError unless the reading holds logits of a whole vocabulary.
    """
    if reading.total is None or reading.candidates:
        raise InputError(
            "A trajectory is of logits of the whole vocabulary: read them without `tokens`, by the logit "
            "lens or the tuned lens."
        )
    logs = reading.scores.float() - reading.total.float()[..., None]
    answer = logs[:, -1].argmax(-1)
    said = logs.gather(2, answer[:, None, None].expand(-1, logs.shape[1], 1))[..., 0]
    entropy = -(logs.exp() * logs).sum(-1)
    last = logs[:, [-1]]
    divergence = (last.exp() * (last - logs)).sum(-1)
    return torch.cat([said, entropy, divergence[:, :-1]], 1).cpu()


def anomaly_scores(
    normal: LensReading, reading: LensReading, *, detector: Detector = "mahalanobis", seed: int = 0
) -> AnomalyScores:
    """Scores a reading's entries by how unlike those of a normal reading their trajectories are.

    "mahalanobis": the distance from the mean, by a covariance that is shrunk (Ledoit and Wolf);
    "neighbours": the local outlier factor of 20 neighbours; "forest": an isolation forest. All are
    scikit-learn's, on features of unit variance. Which to take is to be chosen on other data.

    Source: Belrose et al. 2023, arXiv 2303.08112 (outliers among prediction trajectories; its features are
    all log-probabilities).
    Raises: InputError as `trajectory`; for readings of other layers, fewer than three normal entries, or
    no such detector.
    """
    if normal.layers != reading.layers or normal.lens != reading.lens:
        raise InputError(
            f"The normal reading is a {normal.lens} lens' of {len(normal.layers)} layers, the other a "
            f"{reading.lens} lens' of {len(reading.layers)}: they are to be read alike."
        )
    known, new = trajectory(normal).double(), trajectory(reading).double()
    if len(known) < 3:
        raise InputError(f"There are {len(known)} normal entries: give three at least, better hundreds.")
    mean, spread = known.mean(0), known.std(0).clamp_min(1e-9)
    x, y = ((known - mean) / spread).numpy(), ((new - mean) / spread).numpy()
    if detector == "mahalanobis":
        scores = LedoitWolf().fit(x).mahalanobis(y)
    elif detector == "neighbours":
        lof = LocalOutlierFactor(n_neighbors=min(20, len(x) - 1), novelty=True).fit(x)
        scores = -lof.score_samples(y)
    elif detector == "forest":
        scores = -IsolationForest(random_state=seed).fit(x).score_samples(y)
    else:
        raise InputError(f"There is no detector {detector!r}; there is {', '.join(DETECTORS)}.")
    return AnomalyScores(scores=torch.from_numpy(scores).float(), detector=detector)
