"""Editing a picture by its words: the attention of one prompt's picture in the drawing of another's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.cross_attention._between import check_between_steps
from methods_multimodal.cross_attention._blending import Blender, LocalBlend
from methods_multimodal.cross_attention._rows import RowEdit, RowFn, generate
from methods_multimodal.cross_attention._sites import (
    TextAttention,
    prompt_layouts,
    self_attention,
    text_attention,
)
from methods_multimodal.cross_attention.alignment import refining, replacing, weights
from methods_multimodal.diffusion import sampling_of
from mm_adapters import InputError, Model, TokenLayout

MOST_PIXELS = 256


@dataclass(frozen=True)
class WordEdit:
    """How a target prompt is drawn beside its source.

    mode: "replace" (words swapped one for one), "refine" (words come or go), or None (its own
    attention). `cross`: for which share of the steps the attention to words is the source's, from
    the first; a mapping gives words a share of their own, "default" that of the others. `own`: the
    same for the attention between pixels, up to 16 x 16 of them. `weights`: words turned up or down.

    Source: Hertz et al. 2022, arXiv 2208.01626, section 3.2; shares of 0.8 and 0.4 are typical.
    """

    prompt: str
    mode: str | None = None
    cross: float | Mapping[str, float] = 0.8
    own: float = 0.4
    weights: Mapping[str, float] = field(default_factory=dict)
    blend: LocalBlend | None = None


def edit_words(
    model: Model,
    source: str,
    edits: Sequence[WordEdit],
    *,
    n_steps: int,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Float[Tensor, "row 3 height width"]:
    """The source's picture, then one for each edit, all from the same noise, 0..1.

    Only the conditional half is edited. An edit that changes nothing gives, bit for bit, what its
    prompt gives without one.

    Raises: InputError or WordNotFoundError if prompts or words do not fit, before anything runs.
    """
    pixels = self_attention(model)
    text_attention(model)  # Says so if there is none.
    _check(edits, n_steps)
    first, *others = prompt_layouts(model, [source, *(e.prompt for e in edits)], options)
    attention = text_attention(model, layout=first)
    row_edits: list[RowEdit] = []
    for row, (edit, layout) in enumerate(zip(edits, others, strict=True), start=1):
        for steps, mix in _on_words(edit, first, layout, n_steps):
            row_edits += [RowEdit(a.site("pattern"), row, mix.on(a), steps) for a in attention]
        if edit.own > 0:
            steps = frozenset(range(int(edit.own * n_steps)))
            row_edits += [RowEdit(site, row, _injected, steps) for site in pixels] if steps else []
    options = {**(options or {}), "num_inference_steps": n_steps}
    prompts = [source, *(e.prompt for e in edits)]
    blends = {row: e.blend for row, e in enumerate(edits, start=1) if e.blend is not None}
    reads = []
    if blends:
        check_between_steps(model, "Local blend")
        if sampling_of(model)[1].packed:
            raise InputError(f"Local blend takes latents on a grid; {model.name} packs them into positions.")
        blender = Blender(model, prompts, [first, *others], blends, n_steps)
        reads = blender.reads()
        options["callback_on_step_end"] = blender.after_step
    return generate(model, prompts, [seed] * len(prompts), row_edits, read=reads, options=options)


def _on_words(
    edit: WordEdit, source: TokenLayout, target: TokenLayout, n_steps: int
) -> list[tuple[frozenset[int], _Mix]]:
    """What happens to the attention to words, and at which steps."""
    turned = weights(target, dict(edit.weights)) if edit.weights else None
    if edit.mode is None:
        return [(frozenset(range(n_steps)), _Mix(None, None, turned))] if turned is not None else []
    if edit.mode == "replace":
        mapper, has = replacing(source, target), torch.ones(target.n_pos, dtype=torch.bool)
    else:
        mapper, has = refining(source, target)
    shares = (
        {"default": edit.cross} if isinstance(edit.cross, int | float) else {"default": 0.8, **edit.cross}
    )
    # How many steps each token follows the source for.
    counts = torch.full((target.n_pos,), _n_steps(shares.pop("default"), n_steps))
    for word, share in shares.items():
        counts[target.where(word)] = _n_steps(share, n_steps)
    counts = counts * has
    mixes = []
    bounds = sorted({0, n_steps, *counts.tolist()})
    for start, stop in itertools.pairwise(bounds):
        follows = (counts > start).float()
        if follows.any() or turned is not None:
            mixes.append((frozenset(range(start, stop)), _Mix(mapper, follows, turned)))
    return mixes


def _n_steps(share: float, n_steps: int) -> int:
    # The reference's bounds are of a table with one row more than there are steps.
    return min(int(share * (n_steps + 1)), n_steps)


@dataclass(frozen=True)
class _Mix:
    """From the source's and its own attention to words, what the target's becomes."""

    mapper: Float[Tensor, "source target"] | None
    follows: Float[Tensor, " target"] | None
    turned: Float[Tensor, " target"] | None

    def on(self, layer: TextAttention) -> RowFn:
        """The mix at one layer's pattern."""
        mapper, follows, turned = (
            None if x is None else layer.of_text(x) for x in (self.mapper, self.follows, self.turned)
        )
        if mapper is not None and layer.text is not None:
            mapper = mapper[list(layer.text)]

        def mix(row: Tensor, rows: Tensor) -> Tensor:
            new, n = row, row.shape[-1]  # Without the padding that a pipeline cut off.
            if mapper is not None and follows is not None:
                share = follows.to(row)[:n]
                new = rows[0] @ mapper.to(row)[:n, :n] * share + row * (1 - share)
            return new if turned is None else new * turned.to(row)[:n]

        return mix


def _injected(row: Tensor, rows: Tensor) -> Tensor:
    return rows[0] if row.shape[-1] <= MOST_PIXELS else row


def _check(edits: Sequence[WordEdit], n_steps: int) -> None:
    if not edits:
        raise InputError("There is nothing to edit: give at least one WordEdit.")
    if n_steps < 1:
        raise InputError(f"n_steps={n_steps}: a picture takes at least one step.")
    for edit in edits:
        if edit.mode not in (None, "replace", "refine"):
            raise InputError(f"mode={edit.mode!r}: words are edited by 'replace' or 'refine', or None.")
        shares = edit.cross.values() if isinstance(edit.cross, Mapping) else [edit.cross]
        for share in (*shares, edit.own, *([edit.blend.start] if edit.blend else [])):
            if not 0 <= share <= 1:
                raise InputError(f"{share} is no share of the steps: they go from 0 to 1.")
