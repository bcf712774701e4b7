"""Which tokens of one prompt are which of another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mm_adapters import InputError, TokenLayout


def replacing(source: TokenLayout, target: TokenLayout) -> Float[Tensor, "source target"]:
    """Where each target token takes its attention from, when words are replaced one for one.

    A token of an unchanged word takes it from itself, wherever it went. A word that replaces one of
    another number of tokens shares it out: each of its tokens takes the mean over the old word's, so
    that a word has the attention that its predecessor had. Start, end and padding take it from
    themselves in turn.

    Source: Hertz et al. 2022, arXiv 2208.01626, section 3.2. Their code reads every token after a
    word of another length from the wrong column (google/prompt-to-prompt, seq_aligner.py).
    Raises: InputError if the prompts differ in more than words replaced one for one.
    """
    ours, theirs = _entries(source), _entries(target)
    if len(ours) != len(theirs):
        raise InputError(
            f"Replacing keeps the number of words: {source.texts[0]!r} has {len(ours)}, {target.texts[0]!r} "
            f"has {len(theirs)}. Use refine() where words come or go."
        )
    out = torch.zeros(source.n_pos, target.n_pos)
    for (_, here), (_, there) in zip(ours, theirs, strict=True):
        if len(here) == len(there):
            out[list(here), list(there)] = 1.0
        else:
            # A word's attention is the sum over its tokens: keep that sum.
            out[torch.tensor(here)[:, None], torch.tensor(there)] = 1.0 / len(there)
    _outside(source, target, out)
    return out


def refining(
    source: TokenLayout, target: TokenLayout
) -> tuple[Float[Tensor, "source target"], Bool[Tensor, " target"]]:
    """As `replacing`, where words come or go; and which target tokens have a source at all.

    Words are aligned so that as many as can be are the same and in order.

    Source: Hertz et al. 2022, arXiv 2208.01626, section 3.2; Needleman and Wunsch 1970.
    """
    ours, theirs = _entries(source), _entries(target)
    out = torch.zeros(source.n_pos, target.n_pos)
    has = torch.ones(target.n_pos, dtype=torch.bool)
    pairs = dict(_common([w for w, _ in ours], [w for w, _ in theirs]))
    for j, (_, there) in enumerate(theirs):
        if j not in pairs:
            has[list(there)] = False
            continue
        here = ours[pairs[j]][1]
        out[list(here), list(there)] = 1.0
    _outside(source, target, out)
    return out, has


def weights(layout: TokenLayout, by_word: dict[str, float]) -> Float[Tensor, " token"]:
    """A factor for each token: that of its word, 1 elsewhere.

    Raises: WordNotFoundError listing the words there are; InputError for a negative weight.
    """
    out = torch.ones(layout.n_pos)
    for word, weight in by_word.items():
        if weight < 0:
            raise InputError(f"The weight of {word!r} is {weight}; attention has no negative weights.")
        out[layout.where(word)] = weight
    return out


def _entries(layout: TokenLayout) -> list[tuple[str, tuple[int, ...]]]:
    """Words and marks in the order they stand, each with its tokens."""
    entries = sorted((*layout.words[0], *layout.marks[0]), key=lambda w: w.span)
    return [(w.text.casefold(), w.positions) for w in entries]


def _outside(source: TokenLayout, target: TokenLayout, out: Tensor) -> None:
    """Start, end and padding: each from the same in turn; what there is more of, from the last."""
    for roles in (("start",), ("end", "pad")):
        here = [p for p, r in enumerate(source.roles[0]) if r in roles]
        there = [p for p, r in enumerate(target.roles[0]) if r in roles]
        for i, position in enumerate(there):
            if here:
                out[here[min(i, len(here) - 1)], position] = 1.0


def _common(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, int]]:
    """(index in theirs, index in ours) of a longest common subsequence."""
    table = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i in range(len(ours) - 1, -1, -1):
        for j in range(len(theirs) - 1, -1, -1):
            same = ours[i] == theirs[j]
            table[i][j] = table[i + 1][j + 1] + 1 if same else max(table[i + 1][j], table[i][j + 1])
    pairs: list[tuple[int, int]] = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        if ours[i] == theirs[j]:
            pairs.append((j, i))
            i, j = i + 1, j + 1
        elif table[i + 1][j] >= table[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
