"""Prompts whose tokens of many vectors a pipeline spelt out: their layout by the words of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mm_adapters.tokens.layout import TokenLayout
from mm_adapters.tokens.words import Word

Range = tuple[int, int]


def by_prompt_words(layout: TokenLayout, tokenizer: Any, prompts: Sequence[str]) -> TokenLayout:
    """The layout of spelt-out texts ("<cat> <cat>_1 toy") by the words of the prompts ("<cat> toy").

    A token of many vectors (textual inversion) has the positions of all of them. Texts that are as given, or
    changed in other ways (in case), keep their words.
    """
    rows = range(layout.n_rows)
    replaced = [_replaced(prompts[row], layout.texts[row], tokenizer) for row in rows]
    if not any(replaced):
        return layout

    def words(field: str) -> tuple[tuple[Word, ...], ...]:
        own = [getattr(layout, field)[row] for row in rows]
        every = [(*layout.words[row], *layout.marks[row]) for row in rows]
        return tuple(
            _joined(own[row], every[row], replaced[row]) if replaced[row] else own[row] for row in rows
        )

    texts = tuple(prompts[row] if replaced[row] else layout.texts[row] for row in rows)
    return replace(layout, texts=texts, words=words("words"), marks=words("marks"))


def _replaced(prompt: str, spelt: str, tokenizer: Any) -> list[tuple[Range, Range]]:
    """Where tokens of many vectors stand in a prompt, and where what replaced them does in the text."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    many = sorted((t for t in added if f"{t}_1" in added and t in prompt), key=len, reverse=True)
    out: list[tuple[Range, Range]] = []
    at = there = 0
    while at < len(prompt) and many:
        token = next((t for t in many if prompt.startswith(t, at)), None)
        if token is None:
            at, there = at + 1, there + 1
            continue
        whole, n = token, 1
        while f"{token}_{n}" in added:
            whole, n = f"{whole} {token}_{n}", n + 1
        if not spelt.startswith(whole, there):
            return []
        out.append(((at, at + len(token)), (there, there + len(whole))))
        at, there = at + len(token), there + len(whole)
    return out


def _joined(
    words: Sequence[Word], every: Sequence[Word], replaced: Sequence[tuple[Range, Range]]
) -> tuple[Word, ...]:
    out: list[Word] = []
    counts: dict[str, int] = {}
    for word in words:
        shift, positions = 0, word.positions
        dropped = False
        for (start, stop), (begin, end) in replaced:
            if word.span[0] >= end:
                shift += (end - begin) - (stop - start)
            elif word.span[0] >= begin:
                # Of what was put in, the first token stands for all.
                dropped = word.span[0] >= begin + stop - start
                inside = (other for other in every if begin <= other.span[0] < end)
                positions = tuple(sorted({p for other in inside for p in other.positions}))
        if not dropped:
            key = word.text.casefold()
            span = (word.span[0] - shift, word.span[1] - shift)
            out.append(replace(word, positions=positions, span=span, occurrence=counts.get(key, 0)))
            counts[key] = counts.get(key, 0) + 1
    return tuple(out)
