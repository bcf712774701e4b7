"""Attention that is blocked, and the look at what is left of it: a block that did nothing is an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from methods_multimodal.cross_attention._rows import Change, RowFn
from methods_multimodal.cross_attention.word_reader import find


class Blocked:
    """Puts the scores of some keys to minus infinity, for some queries and heads of one row."""

    def __init__(
        self, keys: Sequence[int], queries: Sequence[int] | None, heads: Sequence[int] | None
    ) -> None:
        self.keys = list(keys)
        self.queries = queries
        self.heads = heads

    def __call__(self, own: Tensor, rows: Tensor) -> Tensor:
        where = self.mask(own)
        return own.masked_fill(where, -torch.inf)

    def mask(self, own: Tensor) -> Tensor:
        """True where [head, query, key] is blocked."""
        where = torch.zeros(own.shape, dtype=torch.bool, device=own.device)
        heads = list(range(own.shape[0])) if self.heads is None else list(self.heads)
        queries = list(range(own.shape[1])) if self.queries is None else list(self.queries)
        index = torch.meshgrid(*(torch.tensor(x) for x in (heads, queries, self.keys)), indexing="ij")
        where[index] = True
        return where


def blocked(keys: Sequence[int], queries: Sequence[int] | None, heads: Sequence[int] | None) -> RowFn:
    """A change that blocks; `watch` knows it again."""
    return Blocked(keys, queries, heads)


def in_text(model: Any, row: int, prompt: str, word: str) -> list[Change]:
    """Blocks a word from every later one, in every text encoder that attends by tokens."""
    changes: list[Change] = []
    for tower in model.tower_names:
        if model.sitemap.towers[tower].record.role != "text" or model.tokenizer_of(tower) is None:
            continue
        positions = find(model.prompt_layout(tower, [prompt]), word)
        for site in model.sites(f"{tower}.*attn.hook_attn_scores"):
            if site.reason is None:
                changes.append(Change(site.name, row, _Later(positions)))
    return changes


class _Later(Blocked):
    """Blocks keys for the queries that come after them."""

    def __init__(self, keys: Sequence[int]) -> None:
        super().__init__(keys, None, None)

    def mask(self, own: Tensor) -> Tensor:
        where = super().mask(own)
        where[:, : max(self.keys) + 1] = False
        return where


class Left:
    """Holds the most attention that is left where it was blocked; a `Read`'s reduce."""

    def __init__(self, site: str, changes: Sequence[Change]) -> None:
        self.site = site
        self.changes = changes
        self.step = -1
        self.most = 0.0

    def __call__(self, pattern: Tensor) -> Tensor:
        self.step += 1
        for change in self.changes:
            if change.steps is None or self.step in change.steps:
                fn = change.fn
                assert isinstance(fn, Blocked)
                own = pattern[change.row]
                self.most = max(self.most, float(own[fn.mask(own)].abs().max()))
        return pattern.new_zeros(0)


def watch(model: Any, changes: Sequence[Change]) -> dict[str, Left]:
    """What to look at, by site: the pattern of every attention that something is blocked in."""
    by_site: dict[str, list[Change]] = {}
    for change in changes:
        if isinstance(change.fn, Blocked):
            by_site.setdefault(change.site.replace("hook_attn_scores", "hook_pattern"), []).append(change)
    return {site: Left(site, own) for site, own in by_site.items()}


def verify(watched: dict[str, Left]) -> None:
    """Raises: RuntimeError if any attention went where it was blocked."""
    leaks = {site: left.most for site, left in watched.items() if left.most > 0}
    idle = [site for site, left in watched.items() if left.step < 0]
    if leaks or idle:
        what = ", ".join(f"{site} still has {most:.2g}" for site, most in leaks.items())
        raise RuntimeError(
            f"Blocked attention is not blocked: {what or ', '.join(idle) + ' was never seen'}. "
            "The model computes its pattern another way; the result would mislead."
        )
