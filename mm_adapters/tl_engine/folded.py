"""A tower's weights as HookedTransformer has them after its default processing; the model keeps its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mm_adapters._errors import InputError


@dataclass(frozen=True)
class FoldedWeights:
    """Weights with each norm's gain and bias in what reads it, and what is written to the stream centred.

    A model of these weights gives logits that differ from the model's own by one number for all tokens, so
    its probabilities are equal. With RMS norms only the unembedding is centred. The biases of values are in
    `b_O`.

    Source: TransformerLens' fold_layer_norm, center_writing_weights, center_unembed, fold_value_biases.
    """

    W_E: Float[Tensor, "token d_model"]
    W_pos: Float[Tensor, "pos d_model"] | None
    W_Q: Float[Tensor, "layer head d_model d_head"]
    W_K: Float[Tensor, "layer head d_model d_head"]
    W_V: Float[Tensor, "layer head d_model d_head"]
    W_O: Float[Tensor, "layer head d_head d_model"]
    b_Q: Float[Tensor, "layer head d_head"]
    b_K: Float[Tensor, "layer head d_head"]
    b_V: Float[Tensor, "layer head d_head"]
    b_O: Float[Tensor, "layer d_model"]
    W_in: Float[Tensor, "layer d_model d_mlp"]
    W_gate: Float[Tensor, "layer d_model d_mlp"] | None
    W_out: Float[Tensor, "layer d_mlp d_model"]
    b_in: Float[Tensor, "layer d_mlp"]
    b_out: Float[Tensor, "layer d_model"]
    W_U: Float[Tensor, "d_model token"]
    b_U: Float[Tensor, " token"]


def folded_weights(tower: Any) -> FoldedWeights:
    """The folded weights of a language tower.

    Raises: InputError if its norms do not come before what reads them, or it has no MLP or no words.
    """
    layers = range(tower.cfg.n_layers)
    if tower.cfg.attn_only or not all(tower._is_pre_norm(layer) for layer in layers):
        raise InputError(
            f"The {tower.name} tower is no stack of attentions and MLPs with a norm before each."
        )
    has_means = not tower.cfg.uses_rms_norm

    def centred(weight: Tensor, dim: int = -1) -> Tensor:
        return weight - weight.mean(dim, keepdim=True) if has_means else weight

    def reading(norm: str, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """[layer, ..., d_model, out] and [layer, ..., out] that read a norm."""
        between = [1] * (weight.ndim - 3)
        gain, added = (
            torch.stack(
                [getattr(getattr(block, norm), name).expand(weight.shape[-2]) for block in tower.blocks]
            )
            for name in "wb"
        )
        added = added.reshape(len(added), *between, -1, 1)
        bias = bias + (added * weight).sum(-2)
        return centred(weight * gain.reshape(added.shape), -2), bias

    queries, keys, values = (
        reading("ln1", getattr(tower, f"W_{letter}"), getattr(tower, f"b_{letter}")) for letter in "QKV"
    )
    neurons = reading("ln2", tower.W_in, tower.b_in)
    # A gate's bias is not one of TransformerLens' weights: none of these models has one.
    gate = None if tower.W_gate is None else reading("ln2", tower.W_gate, torch.zeros_like(tower.b_in))[0]
    norm = tower.ln_final
    unembedding, unembedding_bias = tower.W_U * norm.w[:, None], tower.b_U + norm.b @ tower.W_U
    unembedding = centred(unembedding, 0)
    carried = einsum(values[1], tower.W_O, "layer head d, layer head d model -> layer model")
    return FoldedWeights(
        W_E=centred(tower.W_E),
        W_pos=centred(tower.W_pos) if "pos_embed" in tower._modules else None,
        W_Q=queries[0], b_Q=queries[1], W_K=keys[0], b_K=keys[1],
        W_V=values[0], b_V=torch.zeros_like(values[1]),
        W_O=centred(tower.W_O), b_O=centred(tower.b_O + carried),
        W_in=neurons[0], b_in=neurons[1], W_gate=gate,
        W_out=centred(tower.W_out), b_out=centred(tower.b_out),
        W_U=unembedding - unembedding.mean(-1, keepdim=True),
        b_U=unembedding_bias - unembedding_bias.mean(),
    )  # fmt: skip
