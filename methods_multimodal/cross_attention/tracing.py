"""Which layers, heads and steps carry a word into the picture: patch, silence or block them and look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.cross_attention import _knockout
from methods_multimodal.cross_attention._measuring import DrawParts, measure_parts
from methods_multimodal.cross_attention._rows import Change, copied, draw
from methods_multimodal.cross_attention._sites import text_attention, text_positions
from methods_multimodal.cross_attention.cases import (
    Case,
    Part,
    aligned,
    chosen,
    layouts_of,
    reached,
)
from methods_multimodal.cross_attention.effects import Effects
from methods_multimodal.cross_attention.metrics import Metric
from mm_adapters import InputError, Lens, Read, TokenLayout

EVERYTHING = (Part(),)


def patch_words(
    model: Any,
    cases: Sequence[Case],
    metric: Metric,
    parts: Sequence[Part] = EVERYTHING,
    *,
    reach: str = "after",
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    control_seed: int = 0,
    lens: Lens | None = None,
) -> Effects:
    """Gives a picture the keys and values that another prompt has in a word's place, part by part.

    Both prompts start from the same noise. The goal is the picture of the other prompt. An empty
    `word` patches every position, as LocoGen does.

    Source: Basu et al. 2024, arXiv 2405.01008, section 3 (LocoGen); Meng et al. 2022, arXiv 2202.05262.
    Raises: WordNotFoundError, InputError before anything runs.
    """
    _both(cases)
    layouts = [x for x, _ in layouts_of(model, cases, options)]

    def change(i: int, part: Part, row: int, donor: int, word: str | None) -> list[Change]:
        if word is None:
            return patched(model, cases[i], row, donor, part, reach=reach, options=options)
        case = Case(cases[i].prompt, word, cases[i].other, "")
        at = reached(layouts[i], word, "word")
        return _at(model, case, row, donor, part, at, at)

    for i in range(len(cases)):  # Every mistake in a word comes up here.
        change(i, parts[0], 0, 0, None)
    goals = [c.other for c in cases]
    return _measured(model, cases, goals, metric, parts, change, layouts, "patching",
                     batch, options, control_seed, lens)  # fmt: skip


def patched(
    model: Any,
    case: Case,
    row: int,
    donor: int,
    part: Part = EVERYTHING[0],
    *,
    reach: str = "after",
    options: Mapping[str, Any] | None = None,
) -> list[Change]:
    """What makes one row of `drawn` take a word's keys and values from another."""
    ((own, other),) = layouts_of(model, [case], options)
    assert other is not None
    if not case.word:
        every = text_positions(own)
        return _at(model, case, row, donor, part, every, every)
    return _at(
        model, case, row, donor, part, *aligned(own, other, case.word, case.other_word or case.word, reach)
    )


def _at(
    model: Any, case: Case, row: int, donor: int, part: Part, to: Sequence[int], source: Sequence[int]
) -> list[Change]:
    steps = None if part.steps is None else frozenset(part.steps)
    return [
        Change(layer.site(kind), row, copied(donor, to, source, part.heads), steps)
        for layer in chosen(text_attention(model), part)
        for kind in ("k", "v")
    ]


def knock_out_words(
    model: Any,
    cases: Sequence[Case],
    metric: Metric,
    parts: Sequence[Part] = EVERYTHING,
    *,
    text: bool = True,
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    control_seed: int = 0,
    lens: Lens | None = None,
) -> Effects:
    """Blocks the attention to a word, part by part: of the pixels, and of the words after it (`text`).

    Without `text` the words after it still carry it. The scores are put to minus infinity before
    the softmax; that no attention is left there afterwards is looked at in every run. The goal is
    the picture with the word blocked everywhere.

    Source: Geva et al. 2023, arXiv 2304.14767, section 4.
    Raises: WordNotFoundError, InputError before anything runs; RuntimeError if attention is left.
    """
    layouts = [x for x, _ in layouts_of(model, cases, options)]

    def change(i: int, part: Part, row: int, donor: int, word: str | None) -> list[Change]:
        case = cases[i] if word is None else Case(cases[i].prompt, word)
        return knocked_out(model, case, row, part, text=text, options=options)

    for i in range(len(cases)):
        change(i, parts[0], 0, 0, None)
    return _measured(model, cases, None, metric, parts, change, layouts, "knockout",
                     batch, options, control_seed, lens)  # fmt: skip


def knocked_out(
    model: Any,
    case: Case,
    row: int,
    part: Part = EVERYTHING[0],
    *,
    text: bool = True,
    options: Mapping[str, Any] | None = None,
) -> list[Change]:
    """What makes one row of `drawn` attend nowhere to a word."""
    ((layout, _),) = layouts_of(model, [case], options)
    positions = reached(layout, case.word, "word")
    steps = None if part.steps is None else frozenset(part.steps)
    found = [
        Change(
            layer.site("attn_scores"),
            row,
            _knockout.blocked(positions, layer.pixels, part.heads),
            steps,
        )
        for layer in chosen(text_attention(model, layout=layout), part)
    ]
    return found + (_knockout.in_text(model, row, case.prompt, case.word) if text else [])


def ablate_heads(
    model: Any,
    cases: Sequence[Case],
    metric: Metric,
    parts: Sequence[Part],
    *,
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    lens: Lens | None = None,
) -> Effects:
    """Puts the output of heads of the attention to text to zero, part by part.

    The goal is the picture with all of it at zero; the control is one head of the same run drawn at
    random.

    Raises: InputError before anything runs.
    """
    layouts = [x for x, _ in layouts_of(model, cases, options)]

    def change(i: int, part: Part, row: int, donor: int, word: str | None) -> list[Change]:
        attention = text_attention(model, layout=layouts[i])
        if word is not None:  # The control is no word here.
            part = parts[(i * 7919) % len(parts)]
        steps = None if part.steps is None else frozenset(part.steps)
        return [
            Change(a.site("z"), row, _silenced(part.heads, a.pixels), steps) for a in chosen(attention, part)
        ]

    return _measured(model, cases, None, metric, parts, change, layouts, "ablation",
                     batch, options, 0, lens)  # fmt: skip


def _measured(
    model: Any,
    cases: Sequence[Case],
    goals: Sequence[str] | None,
    metric: Metric,
    parts: Sequence[Part],
    change: Callable[[int, Part, int, int, str | None], list[Change]],
    layouts: Sequence[TokenLayout],
    what: str,
    batch: int,
    options: Mapping[str, Any] | None,
    control_seed: int,
    lens: Lens | None,
) -> Effects:
    """Draws for each case: its picture, its goal, a control, and one picture for each part."""
    n_steps = (options or {}).get("num_inference_steps")
    for part in parts:
        if n_steps is not None and part.steps and not 0 <= min(part.steps) <= max(part.steps) < n_steps:
            raise InputError(f"{part}: the run has the steps 0 to {n_steps - 1}.")

    def drawing_of(i: int, other: str | None, rng: torch.Generator) -> DrawParts:
        case = cases[i]
        ends: list[Change] = [] if goals else change(i, Part(), 1, 1, None)
        if other is not None:
            ends += change(i, Part(), 2, 1, other)

        def draw_parts(chunk: Sequence[int]) -> Tensor:
            prompts = [case.prompt, goals[i] if goals else case.prompt, *[case.prompt] * (1 + len(chunk))]
            own = [c for j, p in enumerate(chunk) for c in change(i, parts[p], 3 + j, 1, None)]
            return drawn(model, prompts, case.seed, [*ends, *own], options, lens)

        return draw_parts

    return measure_parts(cases, layouts, parts, metric, drawing_of, what=what, batch=batch, seed=control_seed)


def drawn(
    model: Any,
    prompts: Sequence[str],
    seed: int,
    changes: Sequence[Change],
    options: Mapping[str, Any] | None = None,
    lens: Lens | None = None,
) -> Float[Tensor, "row 3 height width"]:
    """Pictures from one noise, with what was blocked looked at."""
    watched = _knockout.watch(model, changes)
    reads = [Read(site, reduce=fold, rows="cond") for site, fold in watched.items()]
    images = draw(model, prompts, [seed] * len(prompts), changes, read=reads, options=options, lens=lens)
    _knockout.verify(watched)
    return images


def _both(cases: Sequence[Case]) -> None:
    for case in cases:
        if not case.other:
            raise InputError(f"Patching takes two prompts; the case {case.prompt!r} has no other one.")


def _silenced(
    heads: Sequence[int] | None, pixels: Sequence[int] | None
) -> Callable[[Tensor, Tensor], Tensor]:
    def silence(own: Tensor, rows: Tensor) -> Tensor:
        at = slice(None) if pixels is None else list(pixels)
        part = own[at]
        if heads is None:
            part = torch.zeros_like(part)
        else:
            part[:, list(heads)] = 0
        own[at] = part
        return own

    return silence
