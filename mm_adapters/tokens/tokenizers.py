"""One set of questions for every tokenizer: its tokens, their letters, which are special."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from mm_adapters._errors import InputError

Span = tuple[int, int]
_UNKNOWN = "\ufffd"  # Stands for letters that are not known, so it must not be mistaken for some.


@dataclass(frozen=True)
class TokenizerView:
    """What is asked of a tokenizer, whichever library it is from.

    `encode` gives a text's tokens with those for its start and end and, where the tokenizer knows
    them, the characters each came from.
    """

    encode: Callable[[str], tuple[list[int], list[Span] | None]]
    pieces: Callable[[list[int]], list[str]]
    decode: Callable[[list[int]], str]
    special: frozenset[int]
    start: int | None
    end: int | None
    pad: int | None


def tokenizer_view_of(tokenizer: Any) -> TokenizerView:
    """The same questions, put to a transformers tokenizer or one of open_clip's.

    Raises: InputError if it is neither.
    """
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return _from_transformers(tokenizer, lambda text: text)
    if hasattr(tokenizer, "tokenizer"):  # open_clip's HFTokenizer cleans, then asks another.
        clean = getattr(tokenizer, "clean_fn", lambda text: text)
        return _from_transformers(tokenizer.tokenizer, clean)
    if hasattr(tokenizer, "sot_token_id"):
        start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
        return TokenizerView(
            encode=lambda text: ([start, *tokenizer.encode(text), end], None),
            pieces=lambda ids: [tokenizer.decoder[i] for i in ids],
            decode=tokenizer.decode,
            special=frozenset(tokenizer.all_special_ids),
            start=start,
            end=end,
            pad=0,  # open_clip fills with zeros, which is also the token "!".
        )
    raise InputError(f"{type(tokenizer).__name__} is no tokenizer of transformers or open_clip. Pass one.")


def _from_transformers(tokenizer: Any, clean: Callable[[str], str]) -> TokenizerView:
    def encode(text: str) -> tuple[list[int], list[Span] | None]:
        cleaned = clean(text)
        # Offsets count characters of what the tokenizer saw.
        exact = bool(getattr(tokenizer, "is_fast", False)) and cleaned == text
        out = tokenizer(cleaned, truncation=False, padding=False, return_offsets_mapping=exact)
        return out["input_ids"], [tuple(s) for s in out["offset_mapping"]] if exact else None

    def pick(*names: str) -> int | None:
        return next((v for n in names if (v := getattr(tokenizer, n, None)) is not None), None)

    start, end = pick("bos_token_id", "cls_token_id"), pick("eos_token_id", "sep_token_id")
    pad = pick("pad_token_id")
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    unknown = {pick("unk_token_id")} - {start, end, pad}  # CLIP's unknown token is its end token.
    special -= unknown

    def pieces(ids: list[int]) -> list[str]:
        named = tokenizer.convert_ids_to_tokens(ids)
        # Of an id beyond its vocabulary it says None.
        return [_UNKNOWN if i in unknown or p is None else p for i, p in zip(ids, named, strict=True)]

    return TokenizerView(
        encode=encode,
        pieces=pieces,
        decode=lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        special=frozenset(special),
        start=start,
        end=end,
        pad=pad,
    )


def piece_bytes(piece: str, byte_level: bool) -> bytes:
    """The letters of one token, without its marks; `byte_level`: they are written as bytes."""
    piece = piece.removesuffix("</w>")
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    if byte:
        return bytes([int(byte[1], 16)])
    if piece.startswith("##") and len(piece) > 2:
        piece = piece[2:]
    alphabet = _byte_alphabet()
    if byte_level and all(c in alphabet for c in piece):
        return bytes(alphabet[c] for c in piece)
    return piece.replace("\u2581", " ").encode("utf-8", "surrogateescape")


@cache
def _byte_alphabet() -> dict[str, int]:
    """The letters that byte-level BPE (GPT-2, CLIP) writes bytes with."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
