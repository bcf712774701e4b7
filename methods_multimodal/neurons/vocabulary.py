"""Which tokens a neuron writes for: its output weights read with the unembedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.neurons.places import Neuron, check_neurons, output_weights
from mm_adapters import InputError, Model


@dataclass(frozen=True)
class NeuronTokens(Record):
    """The tokens that each neuron raises most, for a positive activation, and how much in deviations.

    A value is the token's, less the mean over the vocabulary, over its deviation there.
    """

    tokens: Int[Tensor, "neuron k"]
    values: Float[Tensor, "neuron k"]
    neurons: tuple[Neuron, ...]
    tower: str


def project_neurons(
    model: Model, neurons: Sequence[Neuron], *, k: int = 10, tower: str = "language", lowered: bool = False
) -> NeuronTokens:
    """Each neuron's output weights times the final norm's gain and the unembedding: the largest `k` tokens.

    Nothing is run. `lowered` gives the tokens that it lowers most instead: those it raises where it is
    negative.

    Source: Geva et al. 2021, arXiv 2012.14913; Schwettmann et al. 2023, arXiv 2308.01544 (image neurons);
        Pan et al. 2024, arXiv 2311.07470.
    Raises: MissingSiteError if the tower writes no words, or has no such layer; InputError for such a neuron.
    """
    view = model.check_tower(tower)
    n_tokens = view.unembedding.shape[1]
    plain = check_neurons(model, tower, neurons)
    if not 1 <= k <= n_tokens:
        raise InputError(f"k={k}: the vocabulary has 1 to {n_tokens} tokens.")
    matrix = view.unembedding.detach().float()
    gain = (
        torch.ones(matrix.shape[0]).to(matrix)
        if view.final_norm is None
        else view.final_norm.gain.detach().float()
    )
    weights = {layer: output_weights(view, layer) for layer in {layer for layer, _ in plain}}
    written = torch.stack([weights[layer][neuron] for layer, neuron in plain]) * gain
    raised = written @ matrix * (-1.0 if lowered else 1.0)
    scored = (raised - raised.mean(1, keepdim=True)) / raised.std(1, keepdim=True).clamp_min(1e-12)
    values, tokens = scored.topk(k, dim=1)
    return NeuronTokens(tokens, values, plain, tower)
