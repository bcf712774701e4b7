"""Blocks attention, and checks that none is left: a block that did nothing is an error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from methods_multimodal.core import blocked_attention
from methods_multimodal.cross_attention._rows import RowEdit
from methods_multimodal.cross_attention.word_reader import find
from mm_adapters import Call, Model


class BlockKeys:
    """Puts the scores of some keys to minus infinity, for some queries and heads of one row."""

    def __init__(
        self, keys: Sequence[int], queries: Sequence[int] | None, heads: Sequence[int] | None
    ) -> None:
        self.keys = list(keys)
        self.queries = queries
        self.heads = heads

    def __call__(self, row: Tensor, rows: Tensor) -> Tensor:
        return row.masked_fill(self.mask(row), -torch.inf)

    def mask(self, row: Tensor) -> Tensor:
        """True where [head, query, key] is blocked."""
        where = torch.zeros(row.shape, dtype=torch.bool, device=row.device)
        heads = list(range(row.shape[0])) if self.heads is None else list(self.heads)
        queries = list(range(row.shape[1])) if self.queries is None else list(self.queries)
        index = torch.meshgrid(*(torch.tensor(x) for x in (heads, queries, self.keys)), indexing="ij")
        where[index] = True
        return where


def block_in_text(model: Model, row: int, prompt: str, word: str) -> list[RowEdit]:
    """Blocks a word from every other one, in every text encoder that attends by tokens."""
    edits: list[RowEdit] = []
    for tower in model.towers:
        if model.towers[tower].role != "text" or model.tokenizer_of(tower) is None:
            continue
        positions = find(model.prompt_layout(tower, [prompt]), word)
        for site in model.sites(f"{tower}.*attn.hook_attn_scores"):
            if site.reason is None:
                edits.append(RowEdit(site.name, row, _Others(positions)))
    return edits


class _Others(BlockKeys):
    """Blocks keys for every query but their own: those before them too, where an encoder is not causal."""

    def __init__(self, keys: Sequence[int]) -> None:
        super().__init__(keys, None, None)

    def mask(self, row: Tensor) -> Tensor:
        where = super().mask(row)
        where[:, self.keys] = False
        return where


class AttentionLeft:
    """The largest attention left where it was blocked; the `reduce` of a `Read`."""

    def __init__(self, site: str, edits: Sequence[RowEdit]) -> None:
        self.site = site
        self.edits = edits
        self.left = blocked_attention.AttentionLeft()

    @property
    def most(self) -> float:
        """The largest of all calls so far."""
        return self.left.most

    def __call__(self, pattern: Tensor, call: Call) -> Tensor:
        return self.add(self.part(pattern, call), call)

    def part(self, pattern: Tensor, call: Call) -> Tensor:
        """What is left in one call."""
        left = pattern.new_zeros(())
        for edit in self.edits:
            if edit.steps is None or call.step in edit.steps:
                fn = edit.fn
                assert isinstance(fn, BlockKeys)
                row = pattern[edit.row]
                left = torch.maximum(left, row[fn.mask(row)].abs().max())
        return left

    def add(self, part: Tensor, call: Call) -> Tensor:
        """Notes it, and returns nothing to keep."""
        self.left.note(part)
        return part.new_zeros(0)


def watch(edits: Sequence[RowEdit]) -> dict[str, AttentionLeft]:
    """By pattern site: what is left where attention is blocked there."""
    by_site: dict[str, list[RowEdit]] = {}
    for edit in edits:
        if isinstance(edit.fn, BlockKeys):
            by_site.setdefault(edit.site.replace("hook_attn_scores", "hook_pattern"), []).append(edit)
    return {site: AttentionLeft(site, edits) for site, edits in by_site.items()}


def verify(left_by_site: dict[str, AttentionLeft]) -> None:
    """Raises: AttentionUnreachableError if any attention went where it was blocked, or nobody looked."""
    blocked_attention.verify({site: one.left for site, one in left_by_site.items()})
