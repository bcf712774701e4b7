"""Causal tracing by corruption: spoil a word, give one component back its clean value, and look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.cross_attention._rows import Change, copied, copied_whole, draw
from methods_multimodal.cross_attention._sites import text_attention
from methods_multimodal.cross_attention.cases import Case, layouts_of, other_words, reached
from methods_multimodal.cross_attention.effects import Effects
from methods_multimodal.cross_attention.metrics import Metric, scores
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
    labels = tuple((layer,) for layer in sites)
    return _restored(model, cases, metric, pieces, labels, noise, batch, options, noise_seed, lens)


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
    labels = tuple((int(s.layer or 0),) for s in sites)
    return _restored(model, cases, metric, pieces, labels, noise, batch, options, noise_seed, lens)


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
    labels: tuple[tuple[int, ...], ...],
    noise: float,
    batch: int,
    options: Mapping[str, Any] | None,
    noise_seed: int,
    lens: Lens | None,
) -> Effects:
    layouts = [x for x, _ in layouts_of(model, cases, options)]
    for i, case in enumerate(cases):
        reached(layouts[i], case.word, "word")
    if batch < 4:
        raise InputError(
            f"batch={batch}: a run holds a clean, a corrupted, a control and a restored picture."
        )
    generator = torch.Generator().manual_seed(noise_seed)
    table, ends = torch.zeros(len(pieces), len(cases)), torch.zeros(3, len(cases))
    size = batch - 3
    chunks = [range(i, min(i + size, len(pieces))) for i in range(0, len(pieces), size)]
    with tqdm(total=len(cases) * len(chunks), desc="restoring", unit="run", disable=None, leave=False) as bar:
        for i, case in enumerate(cases):
            spare = other_words(layouts[i], [case.word])
            at = int(torch.randint(max(len(spare), 1), (), generator=generator))
            seed = int(torch.randint(2**31, (), generator=generator))
            for k, chunk in enumerate(chunks):
                n = 3 + len(chunk)
                changes = _corrupted(model, layouts[i], case.word, [1, *range(3, n)], noise, seed)
                if spare:
                    changes += _corrupted(model, layouts[i], spare[at], [2], noise, seed)
                for j, p in enumerate(chunk):
                    changes += _bound(pieces[p], i, case.word, 3 + j)
                images = draw(model, [case.prompt] * n, [case.seed] * n, changes, options=options, lens=lens)
                found = scores(metric, images).cpu()
                table[list(chunk), i] = found[3:]
                if k == 0:
                    ends[:, i] = torch.stack([found[1], found[0], found[2]])
                bar.update()
    return Effects(
        changed=table,
        base=ends[0],
        goal=ends[1],
        control=ends[2],
        layers=labels,
        heads=((),) * len(labels),
        steps=((),) * len(labels),
        what="restoring",
        metric=getattr(metric, "__name__", "metric"),
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
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(len(positions), own.shape[-1], generator=generator).to(own)
        own[positions] = own[positions] + noise * every.float().std().to(own) * drawn
        return own

    towers = [t for t in model.tower_names if model.sitemap.towers[t].record.role == "text"]
    return [Change(f"{tower}.hook_embed", row, spoil) for tower in towers for row in rows]
