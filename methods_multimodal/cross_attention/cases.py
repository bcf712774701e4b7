"""What is traced: pictures with a word in question, and the pieces of a run that may carry it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from methods_multimodal.cross_attention._sites import (
    TextAttention,
    prompt_layouts,
    text_attention,
    text_positions,
)
from methods_multimodal.cross_attention.word_reader import find
from mm_adapters import InputError, Model, TokenLayout, WordNotFoundError


@dataclass(frozen=True)
class Case:
    """A picture: its prompt, seed and word in question; and the prompt it is compared with, and its word."""

    prompt: str
    word: str
    other: str = ""
    other_word: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Part:
    """Some layers, heads and steps of a run; None is all of them. Layers are those of the denoiser."""

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None

    def __str__(self) -> str:
        named = [
            f"{name} {_range(values)}"
            for name, values in (("layer", self.layers), ("head", self.heads), ("step", self.steps))
            if values is not None
        ]
        return ", ".join(named) or "everything"


def grid(
    model: Model,
    *,
    layers: bool | int = True,
    heads: bool = False,
    steps: Sequence[Sequence[int]] | None = None,
    denoiser: str = "denoiser",
) -> tuple[Part, ...]:
    """Every piece of a run: each layer, or each window of so many neighbouring layers (`layers=2`),
    alone or by head, and at each of some groups of steps.

    Source: a window of two layers is LocoGen's, Basu et al. 2024, arXiv 2405.01008.
    """
    attention = text_attention(model, denoiser)
    order = [a.layer for a in attention]
    width = int(layers)
    if not 0 <= width <= len(order):
        raise InputError(f"A window of {width} layers: there are {len(order)}.")
    windows = [tuple(order[i : i + width]) for i in range(len(order) - width + 1)] if width else [None]
    groups = [None] if steps is None else [tuple(s) for s in steps]
    sites = {a.layer: model.check_site(a.site("pattern")) for a in attention}
    parts: list[Part] = []
    for window, group in itertools.product(windows, groups):
        layers_here = order if window is None else window
        n = min(_n_heads(sites[layer]) for layer in layers_here)
        each = [(h,) for h in range(n)] if heads else [None]
        parts += [Part(window, h, group) for h in each]
    return tuple(parts)


def step_groups(n_steps: int, n_groups: int) -> tuple[tuple[int, ...], ...]:
    """The steps of a run in so many runs of neighbours, as equal as can be."""
    cut = [round(i * n_steps / n_groups) for i in range(n_groups + 1)]
    return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(cut) if b > a)


def positions_of_word(layout: TokenLayout, word: str, positions: str) -> list[int]:
    """The positions a word is read at.

    positions: "word": its own tokens. "after": those and every later one, because a causal text encoder
    writes a word into all that follow it. Or a later word: from the one to the other.

    Raises: WordNotFoundError if the prompt does not have it; InputError if the later word is not later.
    """
    here = find(layout, word)
    if positions == "word":
        return here
    if positions == "after":
        return [p for p in text_positions(layout) if p >= here[0]]
    last = [p for p in find(layout, positions) if p >= here[0]]
    if not last:
        raise InputError(f"positions={positions!r} comes before {word!r} in the prompt {layout.texts[0]!r}.")
    return list(range(here[0], last[-1] + 1))


def align_positions(
    layout: TokenLayout, other: TokenLayout, word: str, other_word: str, positions: str
) -> tuple[list[int], list[int]]:
    """The positions a word is read at, and for each its position in the other prompt.

    A word of another number of tokens is stretched over ours; what follows it is shifted.
    """
    here, there = find(layout, word), find(other, other_word)
    ours = positions_of_word(layout, word, positions)
    shift = there[-1] - here[-1]
    spread = torch.linspace(0, len(there) - 1, len(here)).round().int().tolist()
    pairs = {p: there[i] for p, i in zip(here, spread, strict=True)}
    last = text_positions(other)[-1]
    theirs = [pairs.get(p, min(max(p + shift, 0), last)) for p in ours]
    return ours, theirs


def matched_words(layout: TokenLayout, word: str) -> list[str]:
    """The words and phrases of a prompt that are a matched control of this one.

    They have as many tokens, none of them this word's, and stand after it: a causal text encoder writes a
    word into those. If there are none they stand before it; an empty list if nothing matches.
    """
    own = find(layout, word)
    words = sorted(layout.words[0], key=lambda w: w.positions[0])
    phrases: dict[str, list[int]] = {}
    for i in range(len(words)):
        for j in range(i, min(len(words), i + len(own))):
            text = " ".join(w.text for w in words[i : j + 1])
            at = _positions_or_none(layout, text)
            if at is not None and len(at) == len(own) and not set(at) & set(own):
                phrases.setdefault(text, at)
    after = [text for text, at in phrases.items() if at[0] > own[0]]
    return after or list(phrases)


def _positions_or_none(layout: TokenLayout, text: str) -> list[int] | None:
    try:
        return layout.where(text)
    except WordNotFoundError:  # Words with a mark between them are no phrase.
        return None


def layouts_of(
    model: Model, cases: Sequence[Case], options: Mapping[str, Any] | None = None
) -> list[tuple[TokenLayout, TokenLayout | None]]:
    """Each case's layouts: of its prompt, and of the other one if it has one."""
    layouts = []
    for case in cases:
        layout, *other = prompt_layouts(model, [case.prompt, *([case.other] if case.other else [])], options)
        layouts.append((layout, other[0] if other else None))
    return layouts


def is_whole(part: Part, attention: Sequence[TextAttention], n_heads: int, n_steps: int | None) -> bool:
    """Whether a part is everything: every layer that attends to text, every head, every step."""
    return (
        (part.layers is None or {a.layer for a in attention} <= set(part.layers))
        and (part.heads is None or set(range(n_heads)) <= set(part.heads))
        and (part.steps is None or (n_steps is not None and set(range(n_steps)) <= set(part.steps)))
    )


def select_layers(attention: Sequence[TextAttention], part: Part) -> list[TextAttention]:
    """The layers of a part. Raises: InputError if one of them does not attend to text."""
    if part.layers is None:
        return list(attention)
    by_layer = {a.layer: a for a in attention}
    missing = [layer for layer in part.layers if layer not in by_layer]
    if missing:
        raise InputError(f"The layers {missing} do not attend to text; those that do: {list(by_layer)}.")
    return [by_layer[layer] for layer in part.layers]


def n_heads_of(model: Model, layer: TextAttention) -> int:
    """The number of heads of a layer."""
    return _n_heads(model.check_site(layer.site("pattern")))


def _n_heads(site: Any) -> int:
    return int(next(a.partition("=")[2] for a in site.axes if a.startswith("head=")))


def _range(values: tuple[int, ...]) -> str:
    if len(values) > 1 and values == tuple(range(values[0], values[-1] + 1)):
        return f"{values[0]}-{values[-1]}"
    return ", ".join(map(str, values))
