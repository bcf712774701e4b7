"""The modules of a tower's tree: each stands for a module of the model, or for what several do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

from mm_adapters._errors import InputError


class Part(nn.Module):
    """A node in the tree of HookPoints. `weights` are the tensors of the module that it stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, Callable[[], Tensor]] = {}
        self.follow: Callable[[], None] | None = None  # Called first: the model may have other modules now.
        self.stands_for: list[nn.Module] = []  # In a list: not a submodule.

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__.get("weights", {}):
            return super().__getattr__(name)
        if self.follow is not None:
            self.follow()
        return self.weights[name]()

    def register_parameter(self, name: str, param: Any) -> None:
        """Raises: InputError, for the weights here are computed from those of the model's module."""
        raise InputError(
            f"{name} would stand beside the model's weights and change nothing. Prune or register it on the "
            "module of the model inside: model.wrapped."
        )

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T of each head of an attention, factored."""
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of each head of an attention, factored."""
        return FactoredMatrix(self.W_V, self.W_O)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module that it stands for returns.

        Raises: InputError if it stands for none: the model computes this inside a larger module.
        """
        if self.follow is not None:
            self.follow()
        if not self.stands_for:
            raise InputError(
                f"{self.__dict__.get('name') or 'This part'} is no module of the model, so it cannot be "
                "called: it holds hook points and weights. Run the tower, and read or edit its sites."
            )
        return self.stands_for[0](*args, **kwargs)


class Embedding(Part):
    """The tower's words, [batch, pos] -> [batch, pos, d_model], as they enter the stream."""

    def forward(self, tokens: Tensor) -> Tensor:
        """The embedding of each token. Raises: InputError if the tower has no table of tokens."""
        if not self.stands_for:
            return super().forward(tokens)
        return self.stands_for[0](tokens)


class Positions(Part):
    """The tower's position table, for as many positions as there are tokens."""

    def forward(
        self, tokens: Tensor, past_kv_pos_offset: int = 0, attention_mask: Tensor | None = None
    ) -> Tensor:
        """[batch, pos, d_model]: the rows of the attended positions, counted from the first attended one.

        Args:
            tokens: [batch, pos]: only their number counts.
            past_kv_pos_offset: How many positions came before.
            attention_mask: [batch, past + pos], 0 at padding on the left; what is not attended has zeros.
        """
        table = self.W_pos
        batch, length = tokens.shape[:2]
        if attention_mask is None:
            rows = table[past_kv_pos_offset : past_kv_pos_offset + length]
            return rows.expand(batch, *rows.shape)
        at = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past_kv_pos_offset:]
        attended = attention_mask[:, past_kv_pos_offset:, None].bool()
        return table[at].where(attended, torch.zeros((), dtype=table.dtype, device=table.device))


class Unembedding(Part):
    """What maps the normalised stream to logits, [..., d_model] -> [..., logit]."""

    def forward(self, x: Tensor) -> Tensor:
        """x W_U + b_U."""
        matrix = self.W_U
        return x.to(matrix.dtype) @ matrix + self.b_U
