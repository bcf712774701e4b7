"""At which layers, heads and steps a word is read: patch, zero or block them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods_multimodal.core.generators import generator
from methods_multimodal.cross_attention import _knockout
from methods_multimodal.cross_attention._rows import RowEdit, copy_positions
from methods_multimodal.cross_attention._sites import text_attention, text_positions
from methods_multimodal.cross_attention._trace import Trace
from methods_multimodal.cross_attention._turned import TURNED, turned
from methods_multimodal.cross_attention.cases import (
    Case,
    Part,
    align_positions,
    layouts_of,
    matched_words,
    positions_of_word,
    select_layers,
)
from methods_multimodal.cross_attention.effects import Effects
from methods_multimodal.cross_attention.metrics import Metric
from mm_adapters import InputError, Model

EVERYTHING = (Part(),)


def patch_words(
    model: Model,
    cases: Sequence[Case],
    metric: Metric,
    parts: Sequence[Part] = EVERYTHING,
    *,
    positions: str = "after",
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    control_seed: int = 0,
    folder: str | Path | None = None,
) -> Effects:
    """Gives a picture the keys and values that another prompt has in a word's place, part by part.

    Both prompts start from the same noise. The goal is the picture of the other prompt. An empty
    `word` patches every position, as LocoGen does. The control of each part changes the same keys and values
    as far, in a random direction.

    With a causal text encoder and positions="after", everything patched at once *is* the other prompt: such a
    part is `by_construction`. What is a finding is how a part of it compares with its control.

    With a `folder`, runs are written down as they are done, and a run that was killed goes on.

    Source: Basu et al. 2024, arXiv 2405.01008, section 3 (LocoGen); Meng et al. 2022, arXiv 2202.05262.
    Raises: WordNotFoundError, InputError before anything runs.
    """
    _check_both(cases)

    def change(i: int, part: Part, row: int) -> list[RowEdit]:
        return patch_edits(model, cases[i], row, 1, part, positions=positions, options=options)

    def control(i: int, part: Part, row: int) -> list[RowEdit]:
        return turned(change(i, part, row), row, control_seed, i)

    goals = [c.other for c in cases]
    named = dict.fromkeys(range(len(cases)), TURNED)
    settings = {"positions": positions, "batch": batch, "seed": control_seed}
    trace = Trace(model, cases, metric, parts, batch, options, folder)
    return trace.effects("patching", change, control, named, goals=goals, settings=settings)


def patch_edits(
    model: Model,
    case: Case,
    row: int,
    donor: int,
    part: Part = EVERYTHING[0],
    *,
    positions: str = "after",
    options: Mapping[str, Any] | None = None,
) -> list[RowEdit]:
    """The edits with which one row of `generate_checked` takes a word's keys and values from another."""
    ((layout, other),) = layouts_of(model, [case], options)
    assert other is not None
    if not case.word:
        every = text_positions(layout)
        return _at(model, case, row, donor, part, every, every)
    return _at(
        model,
        case,
        row,
        donor,
        part,
        *align_positions(layout, other, case.word, case.other_word or case.word, positions),
    )


def _at(
    model: Model, case: Case, row: int, donor: int, part: Part, to: Sequence[int], source: Sequence[int]
) -> list[RowEdit]:
    steps = None if part.steps is None else frozenset(part.steps)
    return [
        RowEdit(layer.site(kind), row, copy_positions(donor, to, source, part.heads), steps)
        for layer in select_layers(text_attention(model), part)
        for kind in ("k", "v")
    ]


def knock_out_words(
    model: Model,
    cases: Sequence[Case],
    metric: Metric,
    parts: Sequence[Part] = EVERYTHING,
    *,
    text: bool = True,
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    control_seed: int = 0,
    folder: str | Path | None = None,
) -> Effects:
    """Blocks the attention to a word, part by part: of the pixels, and of the words after it (`text`).

    Without `text` the words after it still carry it. The scores are put to minus infinity before
    the softmax; that no attention is left there afterwards is looked at in every run. The goal is
    the picture with the word blocked everywhere. The control blocks another word or phrase of the prompt,
    drawn at random among those of as many tokens that stand after the word (before it, if none do); how much
    attention it had may differ. A prompt without such a word has no control.

    With a `folder`, runs are written down as they are done, and a run that was killed goes on.

    Source: Geva et al. 2023, arXiv 2304.14767, section 4.
    Raises: WordNotFoundError, InputError before anything runs; RuntimeError if attention is left.
    """
    rng = generator(control_seed)
    others: dict[int, str] = {}
    for i, (layout, _) in enumerate(layouts_of(model, cases, options)):
        words = matched_words(layout, cases[i].word)
        which = int(torch.randint(max(len(words), 1), (), generator=rng))
        others |= {i: words[which]} if words else {}

    def change(i: int, part: Part, row: int) -> list[RowEdit]:
        return knockout_edits(model, cases[i], row, part, text=text, options=options)

    def control(i: int, part: Part, row: int) -> list[RowEdit]:
        return knockout_edits(model, Case(cases[i].prompt, others[i]), row, part, text=text, options=options)

    named = {i: f"“{word}” blocked" for i, word in others.items()}
    settings = {"text": text, "batch": batch, "seed": control_seed}
    trace = Trace(model, cases, metric, parts, batch, options, folder)
    return trace.effects("knockout", change, control, named, settings=settings)


def knockout_edits(
    model: Model,
    case: Case,
    row: int,
    part: Part = EVERYTHING[0],
    *,
    text: bool = True,
    options: Mapping[str, Any] | None = None,
) -> list[RowEdit]:
    """The edits with which one row of `generate_checked` attends nowhere to a word."""
    ((layout, _),) = layouts_of(model, [case], options)
    positions = positions_of_word(layout, case.word, "word")
    steps = None if part.steps is None else frozenset(part.steps)
    row_edits = [
        RowEdit(
            layer.site("attn_scores"),
            row,
            _knockout.BlockKeys(positions, layer.pixels, part.heads),
            steps,
        )
        for layer in select_layers(text_attention(model, layout=layout), part)
    ]
    return row_edits + (_knockout.block_in_text(model, row, case.prompt, case.word) if text else [])


def ablate_heads(
    model: Model,
    cases: Sequence[Case],
    metric: Metric,
    parts: Sequence[Part],
    *,
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    control_seed: int = 0,
    folder: str | Path | None = None,
) -> Effects:
    """Puts the output of heads of the attention to text to zero, part by part.

    The goal is the picture with all of it at zero; each part's control changes the output of the same heads
    as far, in a random direction. With a `folder`, runs are written down as they are done, and a run that was
    killed goes on.

    Raises: InputError before anything runs.
    """
    layouts = [x for x, _ in layouts_of(model, cases, options)]

    def change(i: int, part: Part, row: int) -> list[RowEdit]:
        attention = text_attention(model, layout=layouts[i])
        steps = None if part.steps is None else frozenset(part.steps)
        return [
            RowEdit(a.site("z"), row, _zeroed(part.heads, a.pixels), steps)
            for a in select_layers(attention, part)
        ]

    def control(i: int, part: Part, row: int) -> list[RowEdit]:
        return turned(change(i, part, row), row, control_seed, i)

    named = dict.fromkeys(range(len(cases)), TURNED)
    settings = {"batch": batch, "seed": control_seed}
    trace = Trace(model, cases, metric, parts, batch, options, folder)
    return trace.effects("ablation", change, control, named, settings=settings)


def _check_both(cases: Sequence[Case]) -> None:
    for case in cases:
        if not case.other:
            raise InputError(f"Patching takes two prompts; the case {case.prompt!r} has no other one.")


def _zeroed(heads: Sequence[int] | None, pixels: Sequence[int] | None) -> Callable[[Tensor, Tensor], Tensor]:
    def zero(row: Tensor, rows: Tensor) -> Tensor:
        at = slice(None) if pixels is None else list(pixels)
        part = row[at]
        if heads is None:
            part = torch.zeros_like(part)
        else:
            part[:, list(heads)] = 0
        row[at] = part
        return row

    return zero
