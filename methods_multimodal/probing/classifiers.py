"""Linear and MLP probes: fitted by scikit-learn, their regularisation chosen on validation rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from torch.nn.functional import cross_entropy

from methods_multimodal.core.record import Record
from mm_adapters import InputError

Head = Literal["linear", "mlp"]
# Inverse strengths of the L2 penalty, scikit-learn's C; of an MLP 1 / C is its alpha.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
_HIDDEN = 64
# A class that no training row had: so unlikely that it is never chosen, and its logarithm is finite.
_NEVER = -30.0


@dataclass(frozen=True)
class Probe(Record):
    """A classifier of vectors: layers "weight0", "bias0", ... after centring and scaling; ReLU between them.

    `strength` is the inverse of its penalty, `validation` its accuracy on the rows that chose it (NaN if
    nothing was chosen).
    """

    layers: dict[str, Tensor]
    centre: Float[Tensor, " width"]
    scale: Float[Tensor, " width"]
    strength: float
    validation: float

    def logits(self, rows: Float[Tensor, "row width"]) -> Float[Tensor, "row klass"]:
        """Each class's logit."""
        values = (rows.double().cpu() - self.centre) / self.scale
        n_layers = len(self.layers) // 2
        for i in range(n_layers):
            values = values @ self.layers[f"weight{i}"] + self.layers[f"bias{i}"]
            values = values.relu() if i + 1 < n_layers else values
        return values

    def predict(self, rows: Float[Tensor, "row width"]) -> Int[Tensor, " row"]:
        """The likeliest class."""
        return self.logits(rows).argmax(1)

    @property
    def directions(self) -> Float[Tensor, "klass width"]:
        """Of a linear probe: the gradient of each class's logit in the space of the rows.

        Raises: InputError for an MLP, whose gradient differs from row to row.
        """
        if len(self.layers) > 2:
            raise InputError("An MLP probe has no one direction for a class; fit a linear one.")
        return self.layers["weight0"].T / self.scale


def fit_probe(
    rows: Float[Tensor, "row width"],
    ids: Int[np.ndarray, " row"],
    *,
    train: Int[Tensor, " train"],
    validation: Int[Tensor, " validation"] | None = None,
    head: Head = "linear",
    strengths: Sequence[float] = STRENGTHS,
    n_classes: int | None = None,
    choose: Literal["accuracy", "likelihood"] = "accuracy",
    seed: int = 0,
) -> Probe:
    """Fits a probe for every strength and keeps the one that is best on the validation rows.

    Equal ones go to the stronger penalty. A linear fit that does not converge is not taken.

    Args:
        rows: What is probed.
        ids: Each row's class.
        train: The rows that the probe and its centring and scaling are fitted on.
        validation: The rows that choose the strength (None: there must be one strength).
        head: "linear" (logistic regression) or "mlp" (one hidden layer of 64).
        strengths: scikit-learn's C.
        n_classes: How many classes there are (None: up to the largest of `ids`).
        choose: By what the validation rows choose.
        seed: Of an MLP's first weights.

    Raises: InputError for rows that are not finite, or no strength whose fit converges.
    """
    if validation is None and len(strengths) != 1:
        raise InputError(
            f"Without validation rows nothing chooses among {len(strengths)} strengths. Give one."
        )
    check_head(head, strengths)
    n_classes = n_classes or int(ids.max()) + 1
    x = rows.double().cpu().numpy()
    if not np.isfinite(x).all():
        raise InputError("The rows hold NaN or infinity. Look at the model's values before they are probed.")
    known = x[train.numpy()]
    centre, scale = known.mean(0), known.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    best: tuple[float, Probe] | None = None
    inputs, targets = (known - centre) / scale, ids[train.numpy()]
    for strength in sorted(strengths):
        layers = _fit(inputs, targets, head, strength, n_classes, seed)
        if layers is None:
            continue
        plain = (torch.from_numpy(centre), torch.from_numpy(scale), float(strength))
        probe, score = Probe(layers, *plain, float("nan")), 0.0
        if validation is not None:
            logits, truth = probe.logits(rows[validation]), torch.from_numpy(ids[validation.numpy()])
            right = float((logits.argmax(1) == truth).double().mean())
            score = right if choose == "accuracy" else -float(cross_entropy(logits, truth))
            probe = Probe(layers, *plain, right)
        if best is None or score > best[0]:
            best = score, probe
    if best is None:
        raise InputError(f"No fit of strength {tuple(strengths)} converged. Give smaller ones.")
    return best[1]


def check_head(head: str, strengths: Sequence[float]) -> None:
    """Raises: InputError for a head that there is not, or strengths that are none."""
    if head not in get_args(Head):
        raise InputError(f"No head {head!r}; there is {', '.join(get_args(Head))}.")
    if not strengths or min(strengths) <= 0:
        raise InputError(f"strengths={tuple(strengths)}: they are inverse penalties above 0, at least one.")


def _fit(
    x: NDArray[np.float64], y: NDArray[np.int64], head: Head, strength: float, n_classes: int, seed: int
) -> dict[str, Tensor] | None:
    there = np.unique(y)
    if len(there) == 1:  # A null's draw may have left one class.
        weights, biases = [np.zeros((x.shape[1], 1))], [np.zeros(1)]
    elif head == "linear":
        fitted: Any = LogisticRegression(C=strength, max_iter=400, tol=1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            try:
                fitted.fit(x, y)
            except ConvergenceWarning:
                return None
        weights, biases = [fitted.coef_.T], [fitted.intercept_]
    else:
        fitted = MLPClassifier(
            (_HIDDEN,), solver="lbfgs", alpha=1 / strength, max_iter=200, random_state=seed
        )
        with warnings.catch_warnings():
            # So many steps are what this probe is, whether or not more would move it.
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted.fit(x, y)
        weights, biases = fitted.coefs_, fitted.intercepts_
    weights, biases = [np.array(w, float) for w in weights], [np.array(b, float) for b in biases]
    weights[-1], biases[-1] = _all_classes(weights[-1], biases[-1], there, n_classes)
    layers = {f"weight{i}": torch.from_numpy(w) for i, w in enumerate(weights)}
    return layers | {f"bias{i}": torch.from_numpy(b) for i, b in enumerate(biases)}


def _all_classes(
    weight: NDArray[np.float64], bias: NDArray[np.float64], there: NDArray[np.int64], n_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The last layer with a column for each class; of two classes scikit-learn has one for the second."""
    if len(there) == 2 and weight.shape[1] == 1:
        weight = np.concatenate([np.zeros_like(weight), weight], 1)
        bias = np.concatenate([np.zeros_like(bias), bias])
    full, biases = np.zeros((len(weight), n_classes)), np.full(n_classes, _NEVER)
    full[:, there], biases[there] = weight, bias
    return full, biases
