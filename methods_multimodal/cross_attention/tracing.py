"""At which layers, heads and steps a word is read: patch, zero or block them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.generators import generator
from methods_multimodal.core.kept import kept
from methods_multimodal.cross_attention import _knockout
from methods_multimodal.cross_attention._measuring import Drawing, check_work, measure_parts
from methods_multimodal.cross_attention._rows import RowEdit, copy_positions, generate
from methods_multimodal.cross_attention._sites import text_attention, text_positions
from methods_multimodal.cross_attention._turned import TURNED, turned
from methods_multimodal.cross_attention.cases import (
    Case,
    Part,
    align_positions,
    is_whole,
    layouts_of,
    matched_words,
    n_heads_of,
    positions_of_word,
    select_layers,
)
from methods_multimodal.cross_attention.effects import Effects
from methods_multimodal.cross_attention.metrics import Metric
from mm_adapters import InputError, Model, Read

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
    return _measured(
        model,
        cases,
        goals,
        metric,
        parts,
        change,
        control,
        named,
        "patching",
        batch,
        options,
        folder,
        settings,
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
    return _measured(
        model,
        cases,
        None,
        metric,
        parts,
        change,
        control,
        named,
        "knockout",
        batch,
        options,
        folder,
        settings,
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
    return _measured(
        model,
        cases,
        None,
        metric,
        parts,
        change,
        control,
        named,
        "ablation",
        batch,
        options,
        folder,
        settings,
    )


# The edits of one row, by a case's number, the part and the row.
Change = Callable[[int, Part, int], list[RowEdit]]


def _measured(
    model: Model,
    cases: Sequence[Case],
    goals: Sequence[str] | None,
    metric: Metric,
    parts: Sequence[Part],
    change: Change,
    control: Change,
    named: Mapping[int, str],
    what: str,
    batch: int,
    options: Mapping[str, Any] | None,
    folder: str | Path | None,
    more: Mapping[str, Any],
) -> Effects:
    """Draws for each case its picture and its goal, and for each part its picture and its control.

    Args:
        model: what draws.
        cases: the pictures, each with a word in question.
        goals: the prompts whose pictures are the goals; None for the picture with everything changed.
        metric: gives a number for each picture.
        parts: what is changed, one at a time.
        change: a part's edits; `control`: those of its control.
        named: what the control of a case is; a case that is not there has none.
        what: the intervention's name.
        batch: rows of a run.
        options: the pipeline's.
        folder: where runs are written down.
        more: settings that stored work is made with.
    """
    check_work(cases, parts, batch)
    attention = text_attention(model)
    n_steps = (options or {}).get("num_inference_steps")
    for part in parts:
        if n_steps is not None and part.steps and not 0 <= min(part.steps) <= max(part.steps) < n_steps:
            raise InputError(f"{part}: the run has the steps 0 to {n_steps - 1}.")
        select_layers(attention, part)
    for i in range(len(cases)):  # Every mistake in a word comes up here.
        change(i, parts[0], 0)
    n_heads = max(n_heads_of(model, layer) for layer in attention)

    def drawing_of(i: int) -> Drawing:
        prompt = cases[i].prompt
        ends = [] if goals else change(i, Part(), 1)

        def draw(chunk: Sequence[int]) -> Tensor:
            row_edits, rows = list(ends), [prompt, goals[i] if goals else prompt]
            for edits_of in (change, control) if i in named else (change,):
                for p in chunk:
                    row_edits += edits_of(i, parts[p], len(rows))
                    rows.append(prompt)
            return generate_checked(model, rows, cases[i].seed, row_edits, options)

        return Drawing(draw, named.get(i, ""))

    settings: dict[str, Any] = {"options": dict(options or {}), "controls": "by part", **more}
    settings |= {"cases": list(cases), "parts": list(parts), "metric": metric}
    with kept(folder, job=what, models={"model": model}, **settings) as work:
        return measure_parts(
            model,
            cases,
            parts,
            metric,
            [drawing_of(i) for i in range(len(cases))],
            what=what,
            batch=batch,
            whole=[is_whole(part, attention, n_heads, n_steps) for part in parts],
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
