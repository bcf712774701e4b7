"""Which tokens each word of a text became."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

from mm_adapters.tokens.tokenizers import Span, TokenizerView, piece_bytes, tokenizer_view_of

TextRole = Literal["start", "end", "word", "pad", "image"]
_UNSPACED = ((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


@dataclass(frozen=True)
class Word:
    """One word where it stands in a text: its tokens, how often it came before, its characters."""

    text: str
    positions: tuple[int, ...]
    occurrence: int
    span: Span


@dataclass(frozen=True)
class AlignedText:
    """One row of tokens read against its text."""

    text: str
    roles: tuple[TextRole, ...]
    words: tuple[Word, ...]
    marks: tuple[Word, ...]


def align_words(
    text: str | None,
    tokenizer: Any,
    ids: list[int],
    mask: Sequence[int] | None = None,
    image_ids: Collection[int] = (),
) -> AlignedText:
    """Reads a row of tokens against the text it came from (None: what the tokens say).

    `image_ids` are the tokens that stand for pictures.

    The tokenizer's own character offsets are used where it gives them and its tokens are these;
    otherwise the tokens' pieces are laid along the text, letter by letter.
    """
    tokenizer_view = tokenizer_view_of(tokenizer)
    if text is None:
        text = tokenizer_view.decode(
            [i for i in ids if i not in tokenizer_view.special and i not in image_ids]
        )
    encoded, offsets = tokenizer_view.encode(text)
    match = _match(ids, encoded, mask, tokenizer_view, image_ids)
    live = [m is not None for m in match] if match else _not_padding(ids, mask, tokenizer_view)
    roles = _roles(ids, live, tokenizer_view, image_ids)
    shown = text
    for image_id in image_ids:  # The image token's own letters are no word of the text.
        if image_id >= 0:
            token = tokenizer_view.pieces([image_id])[0]
            shown = shown.replace(token, " " * len(token))
    if match and offsets:
        blank = [not piece_bytes(p, True).strip() for p in tokenizer_view.pieces(ids)]
        # Llama's tokenizer says that the space it puts in front is the text's first letter.
        covers = [
            set() if m is None or empty else set(range(*offsets[m]))
            for m, empty in zip(match, blank, strict=True)
        ]
    else:
        lettered = [
            i if role == "word" and i not in tokenizer_view.special else None
            for i, role in zip(ids, roles, strict=True)
        ]
        covers = _lay_pieces(shown, tokenizer_view, lettered)
    words, marks = _words(shown, covers, roles)
    return AlignedText(text, roles, words, marks)


def split_words(text: str) -> list[tuple[str, int, int]]:
    """(word, start, end) of each run of letters and digits, and of each other mark alone.

    Characters of scripts written without spaces (Chinese, Japanese) are a word each.
    """
    out: list[tuple[str, int, int]] = []
    growing = False
    for i, char in enumerate(text):
        kind = unicodedata.category(char)[0]
        unspaced = any(low <= ord(char) <= high for low, high in _UNSPACED)
        letter = kind in "LN" or char == "_"
        touches = bool(out) and out[-1][2] == i
        if touches and (kind == "M" or char in "\u200c\u200d" or (letter and growing and not unspaced)):
            out[-1] = (out[-1][0] + char, out[-1][1], i + 1)
        elif not char.isspace():
            out.append((char, i, i + 1))
            growing = letter and not unspaced
        else:
            growing = False
    return out


def _words(
    text: str, covers: list[set[int]], roles: tuple[TextRole, ...]
) -> tuple[tuple[Word, ...], tuple[Word, ...]]:
    owners: dict[int, list[int]] = {}
    for pos, (chars, role) in enumerate(zip(covers, roles, strict=True)):
        for char in chars if role == "word" else ():
            owners.setdefault(char, []).append(pos)
    words, marks = [], []
    counts: dict[str, int] = {}
    for part, start, end in split_words(text):
        at = tuple(sorted({pos for char in range(start, end) for pos in owners.get(char, ())}))
        if not at:  # Some tokenizers drop punctuation.
            continue
        key = part.casefold()
        word = Word(part, at, counts.get(key, 0), (start, end))
        counts[key] = word.occurrence + 1
        (words if any(c.isalnum() for c in part) else marks).append(word)
    return tuple(words), tuple(marks)


def _match(
    ids: list[int],
    encoded: list[int],
    mask: Sequence[int] | None,
    tokenizer_view: TokenizerView,
    image_ids: Collection[int],
) -> list[int | None] | None:
    """For each position its index in `encoded`, None at padding; None if the tokens differ.

    An image token stands in the text once and in the tokens many times.
    """
    encoded_at = [i for i, t in enumerate(encoded) if not (i and t in image_ids and encoded[i - 1] == t)]
    leading = next((i for i, t in enumerate(ids) if t != tokenizer_view.pad), 0)
    starts = [list(mask).index(1)] if mask is not None and 1 in mask else sorted({0, leading})
    for start in starts:
        out: list[int | None] = [None] * start
        pos = start
        for at in encoded_at:
            stop = pos + 1
            while encoded[at] in image_ids and stop < len(ids) and ids[stop] == encoded[at]:
                stop += 1
            if pos >= len(ids) or ids[pos] != encoded[at]:
                break
            out += [at] * (stop - pos)
            pos = stop
        else:
            rest = range(pos, len(ids))
            if all(ids[p] == tokenizer_view.pad or (mask is not None and not mask[p]) for p in rest):
                return out + [None] * len(rest)
    return None


def _not_padding(ids: list[int], mask: Sequence[int] | None, tokenizer_view: TokenizerView) -> list[bool]:
    live = [True] * len(ids) if mask is None else [bool(m) for m in mask]
    if tokenizer_view.pad is None or (mask is not None and not all(mask)):
        return live
    first = next((i for i, t in enumerate(ids) if t != tokenizer_view.pad), 0)
    stop = len(ids)
    while stop > first + 1 and ids[stop - 1] == tokenizer_view.pad:
        stop -= 1
    if tokenizer_view.pad == tokenizer_view.end and stop < len(ids):
        stop += 1  # The first of them is the end.
    if tokenizer_view.pad == tokenizer_view.start and first:
        first -= 1
    return [first <= i < stop and alive for i, alive in enumerate(live)]


def _roles(
    ids: list[int], live: list[bool], tokenizer_view: TokenizerView, image_ids: Collection[int]
) -> tuple[TextRole, ...]:
    roles: list[TextRole] = ["word" if alive else "pad" for alive in live]
    places = [i for i, alive in enumerate(live) if alive]
    for i in places:
        if ids[i] in image_ids:
            roles[i] = "image"
    for nth, i in enumerate(places):
        alone = ids[i] == tokenizer_view.end and not (nth == 0 and tokenizer_view.start == tokenizer_view.end)
        if roles[i] == "image" or ids[i] not in tokenizer_view.special or alone:
            break
        roles[i] = "start"
    for i in reversed(places):
        if roles[i] != "word" or ids[i] not in tokenizer_view.special:
            break
        roles[i] = "end"
    return tuple(roles)


def _lay_pieces(text: str, tokenizer_view: TokenizerView, ids: list[int | None]) -> list[set[int]]:
    """The characters of `text` that each token covers, by laying their letters side by side."""
    letters = [(plain, i) for i, char in enumerate(text) for plain in _plain(char)]
    at = [p for p, token in enumerate(ids) if token is not None]
    pieces = tokenizer_view.pieces([t for t in ids if t is not None])
    best: list[tuple[str, frozenset[int]]] = []
    score = -1.0
    for byte_level in (True, False):
        stream = list(_stream(pieces, byte_level))
        same = [c for c, _ in stream] == [c for c, _ in letters]
        fit = 1.0 if same else _matcher(stream, letters).ratio()
        if fit > score:
            best, score = stream, fit
    covers: list[set[int]] = [set() for _ in ids]
    for _, a0, a1, b0, b1 in _matcher(best, letters).get_opcodes():
        for a in range(a0, a1):
            chars = [b0 + a - a0] if a1 - a0 == b1 - b0 else range(b0, b1)
            for owner in best[a][1]:
                covers[at[owner]].update(letters[b][1] for b in chars)
    return covers


def _matcher(
    stream: list[tuple[str, frozenset[int]]], letters: list[tuple[str, int]]
) -> SequenceMatcher[str]:
    return SequenceMatcher(None, [c for c, _ in stream], [c for c, _ in letters], autojunk=False)


def _stream(pieces: list[str], byte_level: bool) -> Iterator[tuple[str, frozenset[int]]]:
    """(letter, the pieces it comes from); a letter of several bytes may come from several."""
    data, owners = b"", []
    for owner, piece in enumerate(pieces):
        raw = piece_bytes(piece, byte_level)
        data += raw
        owners += [owner] * len(raw)
    done = 0
    for char in data.decode("utf-8", "surrogateescape"):
        size = len(char.encode("utf-8", "surrogateescape"))
        for plain in _plain(char):
            yield plain, frozenset(owners[done : done + size])
        done += size


def _plain(char: str) -> list[str]:
    # Tokenizers differ in what they keep of case and compatibility forms.
    return [c for c in unicodedata.normalize("NFKD", char).casefold() if not c.isspace()]
