"""Our edges and EAP-IG's own algorithm give the same scores; what each costs is printed by the command."""

from __future__ import annotations

from typing import Any

import torch

import mm_adapters as mm
from methods_multimodal.circuits import score_edges
from tests.benchmarks._split_edges import split_edges
from tests.quality.circuit_tasks import clip_pairs


def test_edges_of_a_text_tower_equal_those_with_an_input_for_each_reader() -> None:
    model: Any = mm.load("tiny-clip")
    (pair,) = clip_pairs(model, "text", 3)
    found = score_edges(model, [pair], points=2)
    split = split_edges(model.wrapped, pair.clean, pair.corrupted, 2)
    of_text = [(i, edge) for i, edge in enumerate(found.edges) if edge.startswith("t.")]
    assert {edge for _, edge in of_text} == split.keys()
    ours = torch.stack([found.scores[:, i] for i, _ in of_text], 1)
    theirs = torch.stack([split[edge] for _, edge in of_text], 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert theirs.abs().max() > 1.0
