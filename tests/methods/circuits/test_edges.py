"""Edges from one backward: as many as there are, and the slopes of patching each edge apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.circuits import Pairs, circuit_nodes, score_edges, score_nodes
from methods_multimodal.circuits.patched import row_values, store
from mm_adapters import Edit, Read
from tests.quality.circuit_tasks import clip_pairs, llava_pairs

STEP = 5e-3


@pytest.fixture(scope="module")
def llava() -> Any:
    return mm.load("tiny-llava")


@pytest.fixture(scope="module")
def batch(llava: Any) -> Pairs:
    return llava_pairs(llava, "colour", 2)[0]


def slope(model: Any, batch: Pairs, site: str, change: Callable[[float], Tensor], part: Any) -> Tensor:
    """The central difference of the metric when a part of a site is moved by what patching an edge would."""
    ends = []
    for moved in (change(STEP), change(-STEP)):

        def put(value: Tensor, moved: Tensor = moved) -> Tensor:
            new = value.clone()
            new[part] = moved[part]
            return new

        ends.append(row_values(batch.metric, model.run(batch.clean, edit=[Edit(site, put)])))
    return (ends[0] - ends[1]) / (2 * STEP)


def written(model: Any, batch: Pairs, site: str, module: Any, head: int | None, width: int) -> Tensor:
    """What the change of a node writes into its stream, through the model's own module."""
    node = [n for n in circuit_nodes(model) if n.site == site][:1]
    ends = [store(model, x, node, batch.metric).values[site] for x in (batch.clean, batch.corrupted)]
    moved = ends[1] - ends[0]
    if head is None:
        return moved
    part = torch.zeros_like(moved)
    part[:, :, head] = moved[:, :, head]
    return torch.nn.functional.linear(part.flatten(2), module.weight)


def test_edges_of_tiny_llava_are_all_there_and_sum_to_their_nodes(llava: Any, batch: Pairs) -> None:
    found = score_edges(llava, [batch], method="gradient")
    assert len(found.edges) == len(set(found.edges)) == 246 + 16 + 380
    nodes = score_nodes(llava, [batch], method="gradient")
    sums = found.of_sources()
    for name, score in zip(nodes.nodes, nodes.scores.T, strict=True):
        if name in sums:  # Not those behind the feature layer.
            torch.testing.assert_close(sums[name], score, rtol=1e-3, atol=1e-3)
    assert len(sums) == 43 - 5
    along = score_edges(llava, [batch], points=3)
    nodes = score_nodes(llava, [batch], points=3)
    torch.testing.assert_close(
        along.of_sources()["v.m0"], nodes.scores[:, nodes.nodes.index("v.m0")], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(("reader", "kind"), [("a2.h1<q>", "q"), ("a2.g1<k>", "k"), ("a2.g0<v>", "v")])
def test_edges_into_grouped_query_heads_equal_patching_each_apart(
    llava: Any, batch: Pairs, reader: str, kind: str
) -> None:
    found = score_edges(llava, [batch], method="gradient")
    layer = llava.wrapped.model.language_model.layers[2]
    source = llava.wrapped.model.language_model.layers[1].self_attn.o_proj
    added = written(llava, batch, "language.blocks.1.attn.hook_z", source, 3, 128)
    stream = llava.run(batch.clean, read=["language.blocks.2.hook_resid_pre"]).values[
        "language.blocks.2.hook_resid_pre"
    ]
    project = getattr(layer.self_attn, f"{kind}_proj")

    def change(sign: float) -> Tensor:
        with torch.no_grad():
            return project(layer.input_layernorm(stream + sign * added)).unflatten(-1, (-1, 32))

    part = (slice(None), slice(None), int(reader[4]))
    expected = slope(llava, batch, f"language.blocks.2.attn.hook_{kind}", change, part)
    ours = found.scores[:, found.edges.index(f"a1.h3->{reader}")]
    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-3)


def test_edges_into_a_gated_mlp_and_across_the_projector_equal_patching_apart(
    llava: Any, batch: Pairs
) -> None:
    found = score_edges(llava, [batch], method="gradient")
    model = llava.wrapped.model
    added = written(llava, batch, "vision.blocks.1.hook_mlp_out", None, None, 128)
    names = ["projector.hook_in", "language.blocks.1.hook_resid_mid"]
    values = llava.run(batch.clean, read=names).values

    def into_projector(sign: float) -> Tensor:
        return values[names[0]] + sign * added[:, 1:]  # The class token is not read.

    expected = slope(llava, batch, names[0], into_projector, slice(None))
    ours = found.scores[:, found.edges.index("v.m1->p")]
    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-3)

    head = written(
        llava, batch, "language.blocks.0.attn.hook_z", model.language_model.layers[0].self_attn.o_proj, 2, 128
    )
    block = model.language_model.layers[1]
    ends = []
    for sign in (STEP, -STEP):
        with torch.no_grad():
            given = block.post_attention_layernorm(values[names[1]] + sign * head)
            moved = {"hook_pre": block.mlp.gate_proj(given), "hook_pre_linear": block.mlp.up_proj(given)}
        edits = [
            Edit(f"language.blocks.1.mlp.{site}", lambda value, new=new: new.clone())
            for site, new in moved.items()
        ]
        ends.append(row_values(batch.metric, llava.run(batch.clean, edit=edits)))
    ours = found.scores[:, found.edges.index("a0.h2->m1")]
    torch.testing.assert_close(ours, (ends[0] - ends[1]) / (2 * STEP), rtol=2e-2, atol=2e-3)


def test_edges_of_a_contrastive_models_text_tower_equal_patching_apart() -> None:
    clip: Any = mm.load("tiny-clip")
    (batch,) = clip_pairs(clip, "text", 2)
    found = score_edges(clip, [batch], method="gradient")
    layers = clip.wrapped.text_model.encoder.layers
    added = written(clip, batch, "text.blocks.0.hook_mlp_out", None, None, 128)
    site = "text.blocks.1.hook_resid_pre"
    stream = clip.run(batch.clean, read=[Read(site)]).values[site]
    for kind, project in (("q", layers[1].self_attn.q_proj), ("v", layers[1].self_attn.v_proj)):

        def change(sign: float, project: Any = project) -> Tensor:
            with torch.no_grad():
                return project(layers[1].layer_norm1(stream + sign * added)).unflatten(-1, (4, -1))

        part = (slice(None), slice(None), 2)
        expected = slope(clip, batch, f"text.blocks.1.attn.hook_{kind}", change, part)
        ours = found.scores[:, found.edges.index(f"t.m0->t.a1.h2<{kind}>")]
        torch.testing.assert_close(ours, expected, rtol=3e-2, atol=2e-3)
    assert not found.scores[:, [e.startswith("v.") for e in found.edges]].any()


def test_both_engines_give_the_same_edges(llava: Any, batch: Pairs) -> None:
    other: Any = mm.load("tiny-llava", engine="nnsight")
    one, two = (score_edges(model, [batch], points=2) for model in (llava, other))
    assert torch.equal(one.scores, two.scores)
