"""How many bits labels take, given what is probed: how easily a variable is read, not only whether."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.probing.classifiers import STRENGTHS, Head, check_head, fit_probe
from methods_multimodal.probing.labels import Column, Labels, split_rows
from mm_adapters import InputError

# Where blocks end, as shares of the rows: those of the paper.
ENDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class CodeLength(Record):
    """The online code of a variable's labels: bits of each block, for several orders of the rows.

    `shuffled` is the code of the same labels on other rows. `ends[block]` is how many rows are coded by then,
    `uniform` what a label costs that nothing is known of, log2 of how many classes there are.
    """

    task: Float[Tensor, "order block"]
    shuffled: Float[Tensor, "order block"]
    ends: Int[Tensor, " block"]
    uniform: float
    variable: str
    head: str

    @property
    def compression(self) -> Estimate:
        """How many times shorter the code is than the uniform one, over orders; 1 is no information."""
        return self._compression(self.task)

    @property
    def shuffled_compression(self) -> Estimate:
        """The same of the shuffled labels."""
        return self._compression(self.shuffled)

    @property
    def bits_per_label(self) -> Float[Tensor, "order block"]:
        """What a label costs in each block."""
        return self.task / self.ends.diff(prepend=self.ends.new_zeros(1))

    def _compression(self, bits: Tensor) -> Estimate:
        whole = self.uniform * float(self.ends[-1])
        return bootstrap((whole / bits.sum(1))[:, None], n_resamples=2000)


def code_length(
    rows: Float[Tensor, "row width"],
    values: Column,
    *,
    variable: str = "",
    ends: Sequence[float] = ENDS,
    n_orders: int = 3,
    head: Head = "linear",
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> CodeLength:
    """The online (prequential) code length of labels given vectors.

    Labels are sent block by block, each coded by a probe fitted to the blocks before it; the first by the
    uniform code. A fifth of the rows is set aside, known to both sides, and chooses each probe's strength.
    After `m` rows the probe's probabilities count `m` times and the uniform ones once, so that a class which
    has not come up yet has a code.

    Args:
        rows: What is probed, of one place.
        values: Each row's value of the variable.
        variable: What to call it.
        ends: Where blocks end, as shares of the rows that are coded; the last is 1.
        n_orders: How many orders of the rows, each with other rows set aside and other shuffled labels.
        head: "linear" or "mlp".
        strengths: Inverse penalties among which the rows set aside choose.
        seed: Of the orders.

    Source: Voita and Titov 2020, arXiv 2003.12298, section 2.3.
    Raises: InputError for ends that do not rise to 1, or labels that do not fit the rows.
    """
    check_head(head, strengths)
    if len(values) != len(rows):
        raise InputError(f"There are {len(values)} labels for {len(rows)} rows.")
    if list(ends) != sorted(set(ends)) or not ends or ends[0] <= 0 or ends[-1] != 1 or n_orders < 1:
        raise InputError(
            f"ends={tuple(ends)}: they rise from above 0 to 1, in {n_orders} orders of at least one."
        )
    task, shuffled, counts = [], [], np.zeros(0, int)
    uniform = 0.0
    for order in range(n_orders):
        split = split_rows(len(rows), seed + order, shares=(0.7, 0.2, 0.1))
        labels = Labels.of(variable, values, split)
        uniform = float(np.log2(len(labels.classes)))
        coded = torch.cat([split.train, split.test])
        coded = coded[torch.from_numpy(np.random.default_rng([seed + order, 3]).permutation(len(coded)))]
        counts = np.unique(np.maximum(1, np.round(np.array(ends) * len(coded)).astype(int)))
        for ids, bits in ((labels.ids, task), (labels.shuffled(seed + order), shuffled)):
            first = np.array([counts[0] * uniform])
            later = [
                _block(
                    rows, ids, coded[:a], coded[a:b], split.validation, head, strengths, len(labels.classes)
                )
                for a, b in zip(counts[:-1].tolist(), counts[1:].tolist(), strict=True)
            ]
            bits.append(torch.from_numpy(np.concatenate([first, later])))
    return CodeLength(
        torch.stack(task), torch.stack(shuffled), torch.from_numpy(counts), uniform, variable, head
    )


def _block(
    rows: Tensor,
    ids: NDArray[np.int64],
    known: Tensor,
    coded: Tensor,
    validation: Tensor,
    head: Head,
    strengths: Sequence[float],
    n_classes: int,
) -> float:
    """The bits of one block's labels, by the probe that is fitted to those before."""
    fitted = fit_probe(
        rows,
        ids,
        train=known,
        validation=validation,
        head=head,
        strengths=strengths,
        n_classes=n_classes,
        choose="likelihood",
    )
    shares = fitted.logits(rows[coded]).softmax(1)
    mixed = (len(known) * shares + 1 / n_classes) / (len(known) + 1)
    return float(-mixed[torch.arange(len(coded)), torch.from_numpy(ids[coded.numpy()])].log2().sum())
