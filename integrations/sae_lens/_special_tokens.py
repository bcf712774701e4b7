"""Which positions hold special tokens, where an SAE is not applied: SAELens' `exclude_special_tokens`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from sae_lens.util import get_special_token_ids
from torch import Tensor, nn

from integrations.sae_lens._sites import SAESite
from mm_adapters import HookedModel, InputError


class SpecialTokens:
    """The ids, and the tokens that the tower of an SAE is being called with.

    Raises: InputError where positions are no tokens, and where the ids are not known.
    """

    def __init__(self, root: HookedModel, sae_site: SAESite, special: bool | list[int]) -> None:
        self._name = sae_site.name
        self._tower = root.towers[sae_site.site.tower]
        if self._tower.role not in ("text", "language"):
            raise InputError(
                f"exclude_special_tokens: the positions of {self._name} are no tokens. Leave it out, or "
                "choose positions by tokens='patch'."
            )
        tokenizer = root.tokenizer_of(self._tower.name)
        if special is True and tokenizer is None:
            raise InputError(
                "exclude_special_tokens=True: this model has no tokenizer. Give a list of token ids."
            )
        self._ids = get_special_token_ids(tokenizer) if special is True else list(special or ())
        self._modules = [self._tower.module]
        if isinstance(root.wrapped, nn.Module):
            self._modules.insert(0, root.wrapped)
        self._tokens: Tensor | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the tokens of each call are noted."""
        with ExitStack() as stack:
            for module in self._modules:
                stack.callback(module.register_forward_pre_hook(self._note, with_kwargs=True).remove)
            yield

    def mask(self, flat: Tensor) -> Bool[Tensor, "row pos"]:
        """True at the special tokens of a value [row, pos, ...]. Raises: InputError for other positions."""
        if self._tokens is None or self._tokens.shape != flat.shape[:2]:
            given = "no token ids" if self._tokens is None else f"token ids {list(self._tokens.shape)}"
            raise InputError(
                f"exclude_special_tokens: {self._name} has positions {list(flat.shape[:2])}, and its tower "
                f"was called with {given}. Leave it out, or choose positions by tokens=."
            )
        return torch.isin(self._tokens, torch.tensor(self._ids, device=self._tokens.device)).to(flat.device)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name = self._tower.input_name
        tokens = kwargs.get(name, args[0] if args else None)
        if isinstance(tokens, Tensor) and not tokens.is_floating_point():
            self._tokens = tokens.view(-1, tokens.shape[-1])
