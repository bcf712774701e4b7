"""Which layers, heads and steps carry a word into the picture: patch, zero or block them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.kept import kept
from methods_multimodal.cross_attention import _knockout
from methods_multimodal.cross_attention._measuring import DrawParts, measure_parts
from methods_multimodal.cross_attention._rows import RowEdit, copy_positions, generate
from methods_multimodal.cross_attention._sites import text_attention, text_positions
from methods_multimodal.cross_attention.cases import (
    Case,
    Part,
    align_positions,
    layouts_of,
    positions_of_word,
    select_layers,
)
from methods_multimodal.cross_attention.effects import Effects
from methods_multimodal.cross_attention.metrics import Metric
from mm_adapters import InputError, Model, Read, TokenLayout

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
    `word` patches every position, as LocoGen does.

    With a `folder`, runs are written down as they are done, and a run that was killed goes on.

    Source: Basu et al. 2024, arXiv 2405.01008, section 3 (LocoGen); Meng et al. 2022, arXiv 2202.05262.
    Raises: WordNotFoundError, InputError before anything runs.
    """
    _check_both(cases)
    layouts = [x for x, _ in layouts_of(model, cases, options)]

    def change(i: int, part: Part, row: int, donor: int, word: str | None) -> list[RowEdit]:
        if word is None:
            return patch_edits(model, cases[i], row, donor, part, positions=positions, options=options)
        case = Case(cases[i].prompt, word, cases[i].other, "")
        at = positions_of_word(layouts[i], word, "word")
        return _at(model, case, row, donor, part, at, at)

    for i in range(len(cases)):  # Every mistake in a word comes up here.
        change(i, parts[0], 0, 0, None)
    goals = [c.other for c in cases]
    more = {"positions": positions}
    return _measured(
        model,
        cases,
        goals,
        metric,
        parts,
        change,
        layouts,
        "patching",
        batch,
        options,
        control_seed,
        folder,
        more,
    )


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
    the picture with the word blocked everywhere.

    With a `folder`, runs are written down as they are done, and a run that was killed goes on.

    Source: Geva et al. 2023, arXiv 2304.14767, section 4.
    Raises: WordNotFoundError, InputError before anything runs; RuntimeError if attention is left.
    """
    layouts = [x for x, _ in layouts_of(model, cases, options)]

    def change(i: int, part: Part, row: int, donor: int, word: str | None) -> list[RowEdit]:
        case = cases[i] if word is None else Case(cases[i].prompt, word)
        return knockout_edits(model, case, row, part, text=text, options=options)

    for i in range(len(cases)):
        change(i, parts[0], 0, 0, None)
    more = {"text": text}
    return _measured(
        model,
        cases,
        None,
        metric,
        parts,
        change,
        layouts,
        "knockout",
        batch,
        options,
        control_seed,
        folder,
        more,
    )


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
    folder: str | Path | None = None,
) -> Effects:
    """Puts the output of heads of the attention to text to zero, part by part.

    The goal is the picture with all of it at zero; the control is one head of the same run drawn at
    random. With a `folder`, runs are written down as they are done, and a run that was killed goes on.

    Raises: InputError before anything runs.
    """
    layouts = [x for x, _ in layouts_of(model, cases, options)]

    def change(i: int, part: Part, row: int, donor: int, word: str | None) -> list[RowEdit]:
        attention = text_attention(model, layout=layouts[i])
        if word is not None:  # The control is no word here.
            part = parts[(i * 7919) % len(parts)]
        steps = None if part.steps is None else frozenset(part.steps)
        return [
            RowEdit(a.site("z"), row, _zeroed(part.heads, a.pixels), steps)
            for a in select_layers(attention, part)
        ]

    return _measured(
        model, cases, None, metric, parts, change, layouts, "ablation", batch, options, 0, folder, {}
    )


def _measured(
    model: Model,
    cases: Sequence[Case],
    goals: Sequence[str] | None,
    metric: Metric,
    parts: Sequence[Part],
    change: Callable[[int, Part, int, int, str | None], list[RowEdit]],
    layouts: Sequence[TokenLayout],
    what: str,
    batch: int,
    options: Mapping[str, Any] | None,
    control_seed: int,
    folder: str | Path | None,
    more: Mapping[str, Any],
) -> Effects:
    """Draws for each case: its picture, its goal, a control, and one picture for each part."""
    n_steps = (options or {}).get("num_inference_steps")
    for part in parts:
        if n_steps is not None and part.steps and not 0 <= min(part.steps) <= max(part.steps) < n_steps:
            raise InputError(f"{part}: the run has the steps 0 to {n_steps - 1}.")

    def drawing_of(i: int, other: str | None, rng: torch.Generator) -> DrawParts:
        case = cases[i]
        ends: list[RowEdit] = [] if goals else change(i, Part(), 1, 1, None)
        if other is not None:
            ends += change(i, Part(), 2, 1, other)

        def draw_parts(chunk: Sequence[int]) -> Tensor:
            prompts = [case.prompt, goals[i] if goals else case.prompt, *[case.prompt] * (1 + len(chunk))]
            of_parts = [c for j, p in enumerate(chunk) for c in change(i, parts[p], 3 + j, 1, None)]
            return generate_checked(model, prompts, case.seed, [*ends, *of_parts], options)

        return draw_parts

    settings: dict[str, Any] = {"batch": batch, "options": dict(options or {}), "seed": control_seed, **more}
    settings |= {"cases": list(cases), "parts": list(parts), "metric": metric}
    with kept(folder, job=what, models={"model": model}, **settings) as work:
        return measure_parts(
            model,
            cases,
            layouts,
            parts,
            metric,
            drawing_of,
            what=what,
            batch=batch,
            seed=control_seed,
            work=work,
        )


def generate_checked(
    model: Model,
    prompts: Sequence[str],
    seed: int,
    row_edits: Sequence[RowEdit],
    options: Mapping[str, Any] | None = None,
) -> Float[Tensor, "row 3 height width"]:
    """Pictures from one noise; where attention was blocked it is checked that none is left."""
    left_by_site = _knockout.watch(row_edits)
    reads = [Read(site, reduce=left, rows="cond") for site, left in left_by_site.items()]
    images = generate(model, prompts, [seed] * len(prompts), row_edits, read=reads, options=options)
    _knockout.verify(left_by_site)
    return images


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
