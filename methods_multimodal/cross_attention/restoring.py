"""Causal tracing by corruption: corrupt a word, restore one component, and measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from methods_multimodal.core.generators import generator
from methods_multimodal.cross_attention._measuring import Drawing, check_work, measure_parts
from methods_multimodal.cross_attention._rows import RowEdit, RowFn, copy_positions, copy_row, generate
from methods_multimodal.cross_attention._sites import text_attention
from methods_multimodal.cross_attention._turned import TURNED, turned
from methods_multimodal.cross_attention.cases import Case, Part, layouts_of, positions_of_word
from methods_multimodal.cross_attention.effects import Effects
from methods_multimodal.cross_attention.metrics import Metric
from mm_adapters import InputError, Model, TokenLayout


def restore_layers(
    model: Model,
    cases: Sequence[Case],
    metric: Metric,
    *,
    noise: float = 3.0,
    part: str = "hook_cross_attn_out",
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    noise_seed: int = 0,
) -> Effects:
    """Corrupts a word's embeddings, and gives one layer of the denoiser its clean output, at all steps.

    Base: the corrupted picture. Goal: the clean one. Control: the corrupted picture, with the same layer's
    output changed as far as restoring changes it, in a random direction. `noise` is in standard deviations of
    the embeddings.

    Source: Basu et al. 2023, arXiv 2310.13730, section 3 (its size of the noise is not published).
    """
    attention = text_attention(model)
    sites = {a.layer: f"{a.name.rpartition('.')[0]}.{part}" for a in attention}
    for site in sites.values():
        model.check_site(site)
    pieces = [[RowEdit(site, 0, copy_row(0))] for site in sites.values()]
    parts = [Part((layer,)) for layer in sites]
    return _restored(model, cases, metric, pieces, parts, noise, batch, options, noise_seed)


def restore_text(
    model: Model,
    cases: Sequence[Case],
    metric: Metric,
    *,
    noise: float = 3.0,
    part: str = "hook_attn_out",
    at: str = "last",
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    noise_seed: int = 0,
) -> Effects:
    """Corrupts a word's embeddings, and gives one layer of the text encoder its clean output.

    at: "last", the word's last token; "word", all its tokens; "after", those and all later ones.
    The parts are the text encoder's layers. The rest as in `restore_layers`.

    Source: Basu et al. 2023, arXiv 2310.13730, section 4: in Stable Diffusion the one causal state is
    the self-attention of layer 0 at the subject's last token.
    """
    if at not in ("last", "word", "after"):
        raise InputError(
            f"at={at!r}: a clean value is given back at the 'last' token, the 'word', or 'after'."
        )
    model.check_site(f"text.blocks.0.{part}")
    layouts = [_text_layout(model, "text", case.prompt, options) for case in cases]
    sites = [s for s in model.sites(f"text.blocks.*.{part}") if s.reason is None]
    pieces = [[RowEdit(s.name, 0, _AtWord(layouts, at))] for s in sites]
    parts = [Part((int(s.layer or 0),)) for s in sites]
    return _restored(model, cases, metric, pieces, parts, noise, batch, options, noise_seed)


class _AtWord:
    """A copy of the clean row's values where a case's word stands; bound to a case before use."""

    def __init__(self, layouts: Sequence[TokenLayout], at: str) -> None:
        self.layouts = layouts
        self.at = at

    def of(self, index: int, word: str) -> Any:
        positions = positions_of_word(self.layouts[index], word, "after" if self.at == "after" else "word")
        positions = positions[-1:] if self.at == "last" else positions
        return copy_positions(0, positions, positions)

    def __call__(self, row: Tensor, rows: Tensor) -> Tensor:
        raise AssertionError("A copy at a word is bound to a case first.")


def _restored(
    model: Model,
    cases: Sequence[Case],
    metric: Metric,
    pieces: Sequence[Sequence[RowEdit]],
    parts: Sequence[Part],
    noise: float,
    batch: int,
    options: Mapping[str, Any] | None,
    noise_seed: int,
) -> Effects:
    layouts = [x for x, _ in layouts_of(model, cases, options)]
    for layout, case in zip(layouts, cases, strict=True):
        positions_of_word(layout, case.word, "word")
    check_work(cases, parts, batch)
    rng = generator(noise_seed)

    def drawing_of(i: int) -> Drawing:
        case, seed = cases[i], int(torch.randint(2**31, (), generator=rng))

        def draw(chunk: Sequence[int]) -> Tensor:
            n = 2 + 2 * len(chunk)
            row_edits = _corrupted(model, case.prompt, case.word, range(1, n), noise, seed, options)
            for j, p in enumerate(chunk):
                row_edits += _bound(pieces[p], i, case.word, 2 + j)
                row = 2 + len(chunk) + j
                row_edits += turned(_bound(pieces[p], i, case.word, row), row, noise_seed, i)
            images = generate(model, [case.prompt] * n, [case.seed] * n, row_edits, options=options)
            # The clean picture comes first, because the others copy from it; it is the goal.
            return images[[1, 0, *range(2, n)]]

        return Drawing(draw, TURNED)

    drawings = [drawing_of(i) for i in range(len(cases))]
    return measure_parts(model, cases, parts, metric, drawings, what="restoring", batch=batch)


def _bound(piece: Sequence[RowEdit], index: int, word: str, row: int) -> list[RowEdit]:
    return [
        RowEdit(c.site, row, c.fn.of(index, word) if isinstance(c.fn, _AtWord) else c.fn, c.steps)
        for c in piece
    ]


def _text_layout(model: Model, tower: str, prompt: str, options: Mapping[str, Any] | None) -> TokenLayout:
    """The positions of a prompt in one text encoder, whatever sequence the denoiser makes of them."""
    sizes = {k: v for k, v in (options or {}).items() if k in ("height", "width", "max_sequence_length")}
    layouts = model.layout(text=[prompt], **sizes)
    return layouts[tower] if tower in layouts else model.prompt_layout(tower, [prompt])


def _corrupted(
    model: Model,
    prompt: str,
    word: str,
    rows: Sequence[int],
    noise: float,
    seed: int,
    options: Mapping[str, Any] | None,
) -> list[RowEdit]:
    """The same noise on a word's embeddings, in each of these rows, in every text encoder."""

    def at(positions: Sequence[int]) -> RowFn:
        def corrupt(row: Tensor, every: Tensor) -> Tensor:
            offsets = torch.randn(len(positions), row.shape[-1], generator=generator(seed)).to(row)
            row[positions] = row[positions] + noise * every.float().std().to(row) * offsets
            return row

        return corrupt

    edits = []
    for tower in (name for name, view in model.towers.items() if view.role == "text"):
        layout = _text_layout(model, tower, prompt, options)
        corrupt = at(positions_of_word(layout, word, "word"))
        edits += [RowEdit(f"{tower}.hook_embed", row, corrupt) for row in rows]
    return edits
