"""Causal tracing by corruption: spoil a word, give one component back its clean value, and look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from methods_multimodal.core.generators import generator
from methods_multimodal.cross_attention._measuring import DrawParts, measure_parts
from methods_multimodal.cross_attention._rows import Change, copied, copied_whole, draw
from methods_multimodal.cross_attention._sites import text_attention
from methods_multimodal.cross_attention.cases import Case, Part, layouts_of, reached
from methods_multimodal.cross_attention.effects import Effects
from methods_multimodal.cross_attention.metrics import Metric
from mm_adapters import InputError, Lens, TokenLayout


def restore_layers(
    model: Any,
    cases: Sequence[Case],
    metric: Metric,
    *,
    noise: float = 3.0,
    part: str = "hook_cross_attn_out",
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    noise_seed: int = 0,
    lens: Lens | None = None,
) -> Effects:
    """Corrupts a word's embeddings, and gives one layer of the denoiser its clean output, at all steps.

    Base: the corrupted picture. Goal: the clean one. Control: the picture with another word, drawn at
    random, corrupted in its place. `noise` is in standard deviations of the embeddings.

    Source: Basu et al. 2023, arXiv 2310.13730, section 3 (its size of the noise is not published).
    """
    attention = text_attention(model)
    sites = {a.layer: f"{a.name.rpartition('.')[0]}.{part}" for a in attention}
    for site in sites.values():
        model.sitemap[site]
    pieces = [[Change(site, 0, copied_whole(0))] for site in sites.values()]
    parts = [Part((layer,)) for layer in sites]
    return _restored(model, cases, metric, pieces, parts, noise, batch, options, noise_seed, lens)


def restore_text(
    model: Any,
    cases: Sequence[Case],
    metric: Metric,
    *,
    noise: float = 3.0,
    part: str = "hook_attn_out",
    at: str = "last",
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    noise_seed: int = 0,
    lens: Lens | None = None,
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
    layouts = [x for x, _ in layouts_of(model, cases, options)]
    sites = [s for s in model.sites(f"text.blocks.*.{part}") if s.reason is None]
    if not sites:
        raise InputError(f"The text encoder has no {part!r}. model.sites('text.blocks.0.*') lists its parts.")
    pieces = [[Change(s.name, 0, _AtWord(layouts, at))] for s in sites]
    parts = [Part((int(s.layer or 0),)) for s in sites]
    return _restored(model, cases, metric, pieces, parts, noise, batch, options, noise_seed, lens)


class _AtWord:
    """A copy of the clean row's values where a case's word stands; bound to a case before use."""

    def __init__(self, layouts: Sequence[TokenLayout], at: str) -> None:
        self.layouts = layouts
        self.at = at

    def of(self, index: int, word: str) -> Any:
        positions = reached(self.layouts[index], word, "after" if self.at == "after" else "word")
        positions = positions[-1:] if self.at == "last" else positions
        return copied(0, positions, positions)

    def __call__(self, own: Tensor, rows: Tensor) -> Tensor:
        raise AssertionError("A copy at a word is bound to a case first.")


def _restored(
    model: Any,
    cases: Sequence[Case],
    metric: Metric,
    pieces: Sequence[Sequence[Change]],
    parts: Sequence[Part],
    noise: float,
    batch: int,
    options: Mapping[str, Any] | None,
    noise_seed: int,
    lens: Lens | None,
) -> Effects:
    layouts = [x for x, _ in layouts_of(model, cases, options)]
    for i, case in enumerate(cases):
        reached(layouts[i], case.word, "word")

    def drawing_of(i: int, other: str | None, rng: torch.Generator) -> DrawParts:
        case, seed = cases[i], int(torch.randint(2**31, (), generator=rng))
        control = [] if other is None else _corrupted(model, layouts[i], other, [2], noise, seed)

        def draw_parts(chunk: Sequence[int]) -> Tensor:
            n = 3 + len(chunk)
            changes = _corrupted(model, layouts[i], case.word, [1, *range(3, n)], noise, seed) + control
            for j, p in enumerate(chunk):
                changes += _bound(pieces[p], i, case.word, 3 + j)
            images = draw(model, [case.prompt] * n, [case.seed] * n, changes, options=options, lens=lens)
            # The clean picture comes first, because the others copy from it; it is the goal.
            return images[[1, 0, *range(2, n)]]

        return draw_parts

    return measure_parts(
        cases, layouts, parts, metric, drawing_of, what="restoring", batch=batch, seed=noise_seed
    )


def _bound(piece: Sequence[Change], index: int, word: str, row: int) -> list[Change]:
    return [
        Change(c.site, row, c.fn.of(index, word) if isinstance(c.fn, _AtWord) else c.fn, c.steps)
        for c in piece
    ]


def _corrupted(
    model: Any, layout: TokenLayout, word: str, rows: Sequence[int], noise: float, seed: int
) -> list[Change]:
    """The same noise on a word's embeddings, in each of these rows, in every text encoder."""
    positions = reached(layout, word, "word")

    def spoil(own: Tensor, every: Tensor) -> Tensor:
        drawn = torch.randn(len(positions), own.shape[-1], generator=generator(seed)).to(own)
        own[positions] = own[positions] + noise * every.float().std().to(own) * drawn
        return own

    towers = [t for t in model.tower_names if model.sitemap.towers[t].record.role == "text"]
    return [Change(f"{tower}.hook_embed", row, spoil) for tower in towers for row in rows]
