"""Nodes across towers, and their scores: null patches, whole patches, dead places, and slow versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.circuits import NodeScores, Pairs, circuit_nodes, score_nodes, select_nodes
from methods_multimodal.circuits.patched import patched_metric, store
from mm_adapters import InputError
from tests.quality.circuit_tasks import clip_pairs, llava_pairs, sd_pairs


@pytest.fixture(scope="module")
def llava() -> Any:
    return mm.load("tiny-llava")


@pytest.fixture(scope="module")
def colour_pairs(llava: Any) -> list[Pairs]:
    return llava_pairs(llava, "colour", 6, batch=4)


def test_nodes_of_a_vision_language_model_are_named_as_mib_names_them(llava: Any) -> None:
    names = [node.name for node in circuit_nodes(llava)]
    assert len(names) == len(set(names)) == 2 + 1 + 2 * 4 * (4 + 1)
    assert names[:7] == ["v.input", "v.a0.h0", "v.a0.h1", "v.a0.h2", "v.a0.h3", "v.m0", "v.a1.h0"]
    assert names[21:25] == ["p", "input", "a0.h0", "a0.h1"]


def test_null_patches_move_nothing_and_all_nodes_patched_are_the_corrupted_run(
    llava: Any, colour_pairs: list[Pairs]
) -> None:
    batch, nodes = colour_pairs[0], circuit_nodes(llava)
    clean = store(llava, batch.clean, nodes, batch.metric)
    corrupted = store(llava, batch.corrupted, nodes, batch.metric)
    assert torch.equal(patched_metric(llava, batch.clean, nodes, clean, batch.metric), clean.metric)
    assert torch.equal(patched_metric(llava, batch.clean, nodes, corrupted, batch.metric), corrupted.metric)
    assert not torch.equal(clean.metric, corrupted.metric)


def test_what_lies_behind_the_feature_layer_has_no_effect_at_all(
    llava: Any, colour_pairs: list[Pairs]
) -> None:
    dead = [node for node in circuit_nodes(llava) if node.tower == "vision" and node.layer == 3]
    alive = [node for node in circuit_nodes(llava) if node.name in ("v.m0", "a1.h3")]
    for method in ("exact", "gradient", "integrated", "graddrop"):
        found = score_nodes(llava, colour_pairs[:1], [*dead, *alive], method=method, points=2)
        assert (found.scores[:, :5] == 0.0).all(), method
        assert (found.scores[:, 5:] != 0.0).all(), method


def test_exact_scores_equal_hooks_by_hand(llava: Any, colour_pairs: list[Pairs]) -> None:
    batch = colour_pairs[0]
    nodes = select_nodes(circuit_nodes(llava), ["v.a1.h3", "a1.h2", "v.m0"])
    found = score_nodes(llava, [batch], nodes, method="exact")
    language, vision = llava.wrapped.model.language_model, llava.wrapped.model.vision_tower
    places = [
        (vision.encoder.layers[1].self_attn.out_proj, slice(96, 128)),
        (language.layers[1].self_attn.o_proj, slice(64, 96)),
        (vision.encoder.layers[0].mlp.fc2, slice(None)),
    ]
    for column, (module, part) in enumerate(places):
        kept: list[Tensor] = []

        def take(module: Any, args: Any, kept: list[Tensor] = kept) -> None:
            kept.append(args[0].detach())

        def put(module: Any, args: Any, kept: list[Tensor] = kept, part: slice = part) -> Any:
            new = args[0].clone()
            new[..., part] = kept[0][..., part]
            return (new,)

        with torch.no_grad():
            clean = batch.metric(llava.wrapped(**batch.clean))
            handle = module.register_forward_pre_hook(take)
            llava.wrapped(**batch.corrupted)
            handle.remove()
            handle = module.register_forward_pre_hook(put)
            patched = batch.metric(llava.wrapped(**batch.clean))
            handle.remove()
        torch.testing.assert_close(found.scores[:, column], patched - clean, rtol=1e-4, atol=1e-4)


def test_gradient_scores_equal_small_steps_and_integrated_ones_are_complete(
    llava: Any, colour_pairs: list[Pairs]
) -> None:
    batch = colour_pairs[0]
    nodes = select_nodes(circuit_nodes(llava), ["v.input", "v.m1", "a1.h3"])
    found = score_nodes(llava, [batch], nodes, method="gradient")
    clean = store(llava, batch.clean, nodes, batch.metric)
    corrupted = store(llava, batch.corrupted, nodes, batch.metric)
    step = 1e-2
    for column, node in enumerate(nodes):
        ends = []
        for sign in (step, -step):
            values = {s: v + sign * (corrupted.values[s] - v) for s, v in clean.values.items()}
            moved = type(clean)(values, clean.calls, clean.metric, clean.no_image)
            ends.append(patched_metric(llava, batch.clean, [node], moved, batch.metric))
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(found.scores[:, column], slope, rtol=2e-2, atol=2e-2)
    along = score_nodes(llava, colour_pairs, nodes, method="integrated", points=20)
    assert abs(along.completeness - 1) < 0.02
    assert abs(found.completeness - 1) > 0.3  # The readout saturates.


def test_integrated_scores_find_the_size_of_the_largest_node(llava: Any, colour_pairs: list[Pairs]) -> None:
    exact = score_nodes(llava, colour_pairs, method="exact")
    along = score_nodes(llava, colour_pairs, points=10)
    plain = score_nodes(llava, colour_pairs, method="gradient")
    largest = exact.order(absolute=True)[0]
    at = exact.nodes.index(largest)
    assert abs(float(along.mean[at] / exact.mean[at]) - 1) < 0.1
    assert float(plain.mean[at] / exact.mean[at]) < 0.5
    assert (exact.forwards, exact.backwards) == (45, 0)
    assert (along.forwards, along.backwards) == (12, 10)


@pytest.mark.parametrize("side", ["image", "text", "joint"])
def test_a_contrastive_models_sides_are_patched_apart_and_together(side: str) -> None:
    clip = mm.load("tiny-clip")
    (batch,) = clip_pairs(clip, side, 3)
    nodes = circuit_nodes(clip)
    clean = store(clip, batch.clean, nodes, batch.metric)
    corrupted = store(clip, batch.corrupted, nodes, batch.metric)
    assert torch.equal(patched_metric(clip, batch.clean, nodes, corrupted, batch.metric), corrupted.metric)
    assert torch.equal(patched_metric(clip, batch.clean, nodes, clean, batch.metric), clean.metric)
    scores = score_nodes(clip, [batch], method="integrated", points=16)
    of_text = torch.tensor([name.startswith("t.") for name in scores.nodes])
    assert bool((scores.scores[:, of_text] != 0).any()) == (side != "image")
    assert bool((scores.scores[:, ~of_text] != 0).any()) == (side != "text")
    assert abs(scores.completeness - 1) < 0.05


def test_one_image_beside_two_texts_is_one_row_and_several_are_refused() -> None:
    clip: Any = mm.load("tiny-clip")
    (batch,) = clip_pairs(clip, "image", 3)

    def beside(n_images: int) -> Pairs:
        ends = [
            {k: v[:n_images] if k == "pixel_values" else v[:2] for k, v in x.items()}
            for x in (batch.clean, batch.corrupted)
        ]
        return Pairs(
            ends[0], ends[1], lambda output: output.logits_per_image[:, 0] - output.logits_per_image[:, 1]
        )

    nodes = select_nodes(circuit_nodes(clip), ["v.input", "v.m0", "t.m0"])
    found = score_nodes(clip, [beside(1)], nodes)
    assert found.scores.shape == (1, 3)
    assert abs(found.completeness - 1) < 0.05
    assert found.scores[0, 2] == 0.0
    with pytest.raises(InputError, match="3 rows and the text tower has 2"):
        score_nodes(clip, [beside(3)], nodes)


def test_nodes_of_a_denoiser_are_patched_under_the_prompt_and_step_by_step() -> None:
    sd = mm.load("tiny-sd")
    (batch,) = sd_pairs(sd, "colour", 1, steps=2)
    nodes = circuit_nodes(sd, steps=[(0,), (1,)])
    assert {"t.input", "d.c0.h0@0", "d.c0.h0@1", "d.m0@1"} <= {node.name for node in nodes}
    text = [node for node in nodes if node.tower == "text"]
    clean = store(sd, batch.clean, nodes, batch.metric)
    corrupted = store(sd, batch.corrupted, nodes, batch.metric)
    assert torch.equal(patched_metric(sd, batch.clean, nodes, clean, batch.metric), clean.metric)
    moved = patched_metric(sd, batch.clean, text, corrupted, batch.metric)
    torch.testing.assert_close(moved, corrupted.metric, rtol=0, atol=1e-5)
    late = [node for node in nodes if node.steps == (1,)]
    early = [node for node in nodes if node.steps == (0,)]
    parts = [patched_metric(sd, batch.clean, some, corrupted, batch.metric) for some in (early, late)]
    assert not torch.equal(parts[0], parts[1])


def test_both_engines_score_alike(llava: Any, colour_pairs: list[Pairs]) -> None:
    other: Any = mm.load("tiny-llava", engine="nnsight")
    for method in ("integrated", "exact", "graddrop"):
        nodes = select_nodes(circuit_nodes(llava), ["v.m0", "a1.h3", "p"])
        one, two = (score_nodes(m, colour_pairs[:1], nodes, method=method, points=2) for m in (llava, other))
        assert torch.equal(one.scores, two.scores), method


def test_scores_are_saved_and_a_killed_call_goes_on(
    llava: Any, colour_pairs: list[Pairs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"method": "gradient", "folder": tmp_path / "work"}
    whole = score_nodes(llava, colour_pairs, **options)
    assert len(list((tmp_path / "work").glob("batch*"))) == 2

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr(type(llava), "run", refuse)
    again = score_nodes(llava, colour_pairs, **options)
    path = again.save(tmp_path / "scores.safetensors")
    back = NodeScores.load(path)
    assert torch.equal(back.scores, whole.scores)
    assert back.nodes == whole.nodes
    assert back.order() == whole.order()


def test_pairs_that_cannot_be_compared_are_refused(llava: Any, colour_pairs: list[Pairs]) -> None:
    batch = colour_pairs[0]
    ids = batch.clean["input_ids"]
    longer = {**batch.corrupted, "input_ids": torch.cat([ids, ids[:, -1:]], 1)}
    with pytest.raises(InputError, match="one shape; input_ids"):
        score_nodes(llava, [Pairs(batch.clean, longer, batch.metric)])
    moved = {**batch.corrupted, "input_ids": ids.roll(1, 1)}
    with pytest.raises(InputError, match="differ in what stands where"):
        score_nodes(llava, [Pairs(batch.clean, moved, batch.metric)])
    with pytest.raises(InputError, match="the same for the clean and the corrupted"):
        score_nodes(llava, [Pairs(batch.clean, batch.clean, batch.metric)])

    def sure(output: Any) -> Tensor:
        return torch.sigmoid(50 * batch.metric(output))

    with pytest.raises(InputError, match="saturated probability"):
        score_nodes(llava, [Pairs(batch.clean, batch.corrupted, sure)])

    def cut(output: Any) -> Tensor:
        return batch.metric(output).detach()

    with pytest.raises(InputError, match="without a gradient"):
        score_nodes(llava, [Pairs(batch.clean, batch.corrupted, cut)])
    with pytest.raises(InputError, match=r"no node 'a9\.h9'"):
        select_nodes(circuit_nodes(llava), ["a9.h9"])
