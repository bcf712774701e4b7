"""A tower's weights stacked over layers, and what TransformerLens computes from them."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformer_lens.utilities.matrix import composition_scores

from mm_adapters._errors import InputError, MissingSiteError
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.sites.weights import tensor_at


class Stacked:
    """A weight of one part of every block, stacked over layers."""

    def __init__(self, part: str) -> None:
        self._part = part

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, tower: TowerWeights, owner: type | None = None) -> Tensor:
        return self.of(tower, self._part, self._name)

    @staticmethod
    def of(tower: TowerWeights, part: str, name: str) -> Tensor:
        """That weight, [layer, ...]."""
        tower._mounted.check_one_stream()
        return torch.stack([getattr(getattr(block, part), name) for block in tower.blocks])


class HeadLabels(list[str]):
    """A label for each head. HookedTransformer calls it, TransformerBridge reads it: both work."""

    def __call__(self) -> list[str]:
        return list(self)


class TowerWeights:
    """`W_Q` [layer, head, d_model, d_head] and the rest; the weights are never copied or folded.

    `W_U` is what maps the normalised residual to the tower's logits: a language model's head, or
    the zero-shot classifier of the texts given to `set_classes`. TransformerLens folds the final
    norm's gain into `W_U`; here `tokens_to_residual_directions` does it, so `logit_attrs` is exact,
    and `logit_bias` holds what the norm's own bias adds to each logit.
    """

    blocks: nn.ModuleList
    cfg: Any
    name: str
    _mounted: TowerView
    _root: Any
    _class_names: list[str] | None
    _class_directions: Tensor | None
    to_single_token: Any

    W_Q = Stacked("attn")
    W_K = Stacked("attn")
    W_V = Stacked("attn")
    W_O = Stacked("attn")
    W_in = Stacked("mlp")
    W_out = Stacked("mlp")
    b_Q = Stacked("attn")
    b_K = Stacked("attn")
    b_V = Stacked("attn")
    b_O = Stacked("attn")
    b_in = Stacked("mlp")
    b_out = Stacked("mlp")

    @property
    def W_gate(self) -> Tensor | None:
        """The gates of the MLPs; None if they have none."""
        return Stacked.of(self, "mlp", "W_gate") if self.cfg.gated_mlp else None

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T of every head, factored."""
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every head, factored."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def all_head_labels(self) -> HeadLabels:
        """ "L0H0", "L0H1", ...: one for each head."""
        return HeadLabels(f"L{i}H{j}" for i in range(self.cfg.n_layers) for j in range(self.cfg.n_heads))

    def all_composition_scores(self, mode: str) -> Float[Tensor, "layer head layer head"]:
        """How much each later head reads of what each earlier one writes; zero for all other pairs.

        `mode` is what it reads it with: "Q", "K" or "V". Source: Elhage et al. 2021, A Mathematical Framework
        for Transformer Circuits.
        """
        if mode not in ("Q", "K", "V"):
            raise InputError(f"mode={mode!r}: mode must be one of 'Q', 'K' and 'V', with which a head reads.")
        right = {"Q": self.QK, "K": self.QK.T, "V": self.OV}[mode]
        scores = composition_scores(self.OV, right, broadcast_dims=True)
        layers = torch.arange(self.cfg.n_layers, device=scores.device)
        is_later = layers[:, None, None, None] < layers[None, None, :, None]
        return torch.where(is_later, scores, torch.zeros_like(scores))

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embeddings."""
        return self._table("embed", "W_E")

    @property
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        """Position embeddings, from the first position on."""
        table = self._table("position", "W_pos")
        return table.reshape(-1, self.cfg.d_model or table.shape[-1])[self._mounted.first_position_row :]

    @property
    def W_E_pos(self) -> Float[Tensor, "row d_model"]:
        """Token embeddings and, below them, position embeddings."""
        return torch.cat([self.W_E, self.W_pos])

    @property
    def W_U(self) -> Float[Tensor, "d_model logit"]:
        """The unembedding; see the class docstring."""
        project = self.projection
        if self._class_directions is not None:
            return project @ self._class_directions.to(project).T
        if self._mounted.record.role != "language":
            raise InputError(
                f"The {self.name} tower has no classes yet, so no unembedding. "
                'Give it some: model.vision.set_classes(["a red circle", "a blue square"]).'
            )
        return project

    @property
    def b_U(self) -> Float[Tensor, " logit"]:
        """The unembedding's bias; zeros if it has none."""
        bias = self._mounted.projection_bias
        if bias is None or self._class_directions is not None:
            extra = 0 if bias is None else bias @ self._class_directions.to(bias).T  # type: ignore[union-attr]
            return self.W_U.new_zeros(self.W_U.shape[1]) + extra
        return bias

    @property
    def projection(self) -> Float[Tensor, "d_model d_out"]:
        """What maps the normalised pooled residual to the tower's summary; the identity if nothing does.

        Raises: MissingSiteError if the summary is not a linear map of one position.
        """
        matrix, norm = self._mounted.projection, self._mounted.final_norm
        if matrix is not None:
            return matrix
        width = self.cfg.d_model or (0 if norm is None else norm.gain.numel())
        return torch.eye(width, device=self.cfg.device)

    @property
    def logit_bias(self) -> Float[Tensor, " logit"]:
        """What the final norm's bias and the unembedding's add to every logit."""
        norm = self._mounted.final_norm
        return self.b_U if norm is None else norm.bias @ self.W_U + self.b_U

    def set_classes(self, names: list[str] | None, directions: Tensor | None = None) -> None:
        """Makes the tower's unembedding the zero-shot classifier of these texts (None: none).

        `directions` are the classes' unit vectors in the joint space [class, d_joint]; without them
        the texts are encoded by this model's text tower.
        """
        if names is None:
            self._class_names = self._class_directions = None
            self._resize(-1)
            return
        if not names:
            raise InputError("set_classes was given no classes; give at least one text.")
        if directions is None:
            with torch.no_grad():
                directions = self._root.embed(text=list(names))
        assert directions is not None
        self._class_names = list(names)
        self._class_directions = torch.nn.functional.normalize(directions.detach(), dim=-1)
        self._resize(len(names))

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Float[Tensor, "*shape d_model"]:
        """The residual direction of each token or class, with the final norm's gain folded in."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.W_U.device)
        norm = self._mounted.final_norm
        gain = torch.ones(1) if norm is None else norm.gain
        directions = rearrange(self.W_U[:, ids], "d ... -> ... d") * gain
        return directions.reshape(-1) if ids.numel() == 1 and ids.ndim <= 1 else directions

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of the output biases of all attention (and MLP) before the input of `layer`."""
        total = torch.zeros(self.cfg.d_model, device=self.cfg.device)
        for index in range(layer + bool(mlp_input)):
            block: Any = self.blocks[index]
            total = total + block.attn.b_O
            if include_mlp_biases and index < layer:
                total = total + block.mlp.b_out
        return total

    def tl_parameters(self) -> dict[str, Tensor]:
        """Every weight under TransformerLens' parameter name (what SVDInterpreter reads)."""
        named: dict[str, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            for part, container in block.named_children():
                for weight, get in getattr(container, "weights", {}).items():
                    named[f"blocks.{layer}.{part}.{weight}"] = get()
        for key, attribute in (("embed.W_E", "W_E"), ("pos_embed.W_pos", "W_pos"), ("unembed.W_U", "W_U")):
            try:
                named[key] = getattr(self, attribute)
            except (MissingSiteError, InputError):
                continue
        return named

    def _resize(self, n_logits: int) -> None:
        self.cfg.d_vocab_out = n_logits
        if self._mounted.record.embed is None:  # A tower without words has its classes for a vocabulary.
            self.cfg.d_vocab = n_logits

    def _class_index(self, name: str) -> int:
        assert self._class_names is not None
        if name not in self._class_names:
            raise InputError(f"No class {name!r}; there is {', '.join(map(repr, self._class_names))}.")
        return self._class_names.index(name)

    def _table(self, field: str, name: str) -> Tensor:
        path = getattr(self._mounted.record, field)
        table = tensor_at(self._mounted.module, path) if path else None
        if table is None:
            raise MissingSiteError(f"The {self.name} tower has no {name}: it has no such table.")
        return table
