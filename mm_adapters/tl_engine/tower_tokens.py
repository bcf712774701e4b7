"""A text or language tower's tokenizer, as HookedTransformer speaks it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mm_adapters._errors import HostAssertionError, InputError


class TowerTokens:
    """Text to tokens and back. The tower has `tokenizer`, `cfg` and says whether it pools at the end."""

    tokenizer: Any
    cfg: Any
    appends_end: bool

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids, padded to the longest text.

        The start token is put first unless `prepend_bos` is False or the tokenizer has none; a tower
        that pools at its end token always gets that token too.

        Raises: InputError if the tower has no tokenizer, the list is empty, or a text is longer
        than the context and `truncate` is False.
        """
        tokenizer = self._known_tokenizer()
        texts = [input] if isinstance(input, str) else list(input)
        if not texts or not all(isinstance(t, str) for t in texts):
            raise InputError(f"to_tokens takes a string or a list of strings, not {input!r}.")
        start = tokenizer.bos_token_id
        use_start = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        rows: list[list[int]] = []
        for text in texts:
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            while self.cfg.tokenizer_appends_eos and ids and ids[-1] == tokenizer.eos_token_id:
                ids.pop()  # The model goes on from a text; as TransformerLens' bridge.
            ids = ([start] if use_start and start is not None else []) + ids
            rows.append([*ids, tokenizer.eos_token_id] if self.appends_end else ids)
        longest = max(len(r) for r in rows)
        if longest > self.cfg.n_ctx:
            if not truncate:
                raise InputError(
                    f"A text has {longest} tokens; the {self.cfg.tower} tower holds {self.cfg.n_ctx}. "
                    "Shorten it, or pass truncate=True."
                )
            keep = self.cfg.n_ctx - self.appends_end
            end = [tokenizer.eos_token_id] if self.appends_end else []
            rows = [r if len(r) <= self.cfg.n_ctx else r[:keep] + end for r in rows]
            longest = max(len(r) for r in rows)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        left = self.pads_left(padding_side)
        fill = [[pad] * (longest - len(r)) for r in rows]
        ids = [f + r if left else r + f for f, r in zip(fill, rows, strict=True)]
        return torch.tensor(ids, device=self.cfg.device if move_to_device else None)

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of a row of tokens, or a list of texts for several rows."""
        ids = torch.as_tensor(tokens)
        tokenizer = self._known_tokenizer()
        if ids.ndim == 2:
            return [tokenizer.decode(row) for row in ids.tolist()]
        return tokenizer.decode(ids.reshape(-1).tolist())

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> list[str] | list[list[str]]:
        """Each token of a text (or of a row of tokens) as a string; a list of those for several texts.

        A text longer than the context is cut. `padding_side` changes nothing: one text has no padding.
        """
        if isinstance(input, str):
            tokens = self.to_tokens(input, prepend_bos, padding_side, truncate=True)[0]
        elif isinstance(input, Sequence) and input and not isinstance(input[0], int):
            return [self.to_str_tokens(text, prepend_bos) for text in input]  # type: ignore[misc]
        else:
            tokens = torch.as_tensor(input)
            if tokens.squeeze().ndim > 1:
                raise InputError(
                    f"to_str_tokens takes one row of tokens, not {tuple(tokens.shape)}. Give a list of rows."
                )
        tokenizer = self._known_tokenizer()
        return [tokenizer.decode([i]) for i in tokens.reshape(-1).tolist()]

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token, tried as it is and then after a space.

        Raises: InputError with its pieces if it is several tokens.
        """
        tokenizer = self._known_tokenizer()
        ids = list(tokenizer(string, add_special_tokens=False)["input_ids"])
        if len(ids) != 1:
            pieces = [tokenizer.decode([i]) for i in ids]
            raise InputError(f"{string!r} is {len(ids)} tokens here, {pieces}, not one.")
        return ids[0]

    def to_single_str_token(self, int_token: int) -> str:
        """One token as a string."""
        return self._known_tokenizer().decode([int_token])

    def get_token_position(
        self,
        single_token: str | int,
        input: Any,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Where a token stands in a text; `mode` is "first" or "last".

        Raises: InputError for another mode; HostAssertionError, which is one, if the token is not there.
        """
        if mode not in ("first", "last"):
            raise InputError(f"mode={mode!r}: a token's first or last position, 'first' or 'last'.")
        tokens = (
            self.to_tokens(input, prepend_bos, padding_side)[0]
            if isinstance(input, str)
            else torch.as_tensor(input)
        )
        token = self.to_single_token(single_token) if isinstance(single_token, str) else single_token
        at = (tokens.squeeze() == token).nonzero().reshape(-1).tolist()
        if not at:
            raise HostAssertionError(
                f"Token {single_token!r} does not occur in {self.to_str_tokens(tokens)}."
            )
        return at[0] if mode == "first" else at[-1]

    def pads_left(self, side: str | None) -> bool:
        """Whether texts are padded on the left. Raises: InputError for a side that there is not."""
        if side not in ("left", "right", None):
            raise InputError(f"padding_side={side!r}: it is 'left', 'right' or None.")
        return (side or self._known_tokenizer().padding_side) == "left" and not self.appends_end

    def _known_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise HostAssertionError(
                f"The {self.cfg.tower} tower has no tokenizer; there is no to_tokens without a tokenizer. "
                "Pass one: mm_adapters.wrap(model, tokenizer=...)."
            )
        return self.tokenizer
