"""What texts, parts and images must be for an explanation, beside the nearest that is none."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from sklearn.decomposition import NMF, PCA
from torch import Tensor
from unchecked import unchecked

import mm_adapters as mm
from methods_multimodal.text_explanations import pooled_run, sparse_coding
from methods_multimodal.text_explanations.ablation import Component, ablate
from methods_multimodal.text_explanations.components import align, rank_components
from methods_multimodal.text_explanations.concept_dictionary import concept_dictionary
from methods_multimodal.text_explanations.decomposition import (
    Decomposition,
    decompose,
    decompositions,
)
from methods_multimodal.text_explanations.moments import Moments
from methods_multimodal.text_explanations.pooled_run import _check_pixels, _pooled
from methods_multimodal.text_explanations.second_order import second_order
from methods_multimodal.text_explanations.segmentation import _maps
from methods_multimodal.text_explanations.spurious import group_accuracy
from methods_multimodal.text_explanations.text_span import NothingVariesError, text_span
from methods_multimodal.text_explanations.vocabulary import Vocabulary
from mm_adapters import InputError

naming = importlib.import_module("methods_multimodal.text_explanations.name_heads")


def _decomposition(n: int = 6, width: int = 3) -> Decomposition:
    """Two layers of two heads, tokens summed."""
    g = torch.Generator().manual_seed(0)
    heads, mlps = torch.randn(n, 2, 1, 2, width, generator=g), torch.randn(n, 3, width, generator=g)
    none, own = torch.zeros(n, width), torch.randn(n, width, generator=g)
    return Decomposition(heads, mlps, none, none, own, own.norm(dim=1), None, "exact")


def test_an_ablation_takes_away_what_it_says() -> None:
    parts = _decomposition()
    heads, total = parts.heads[:, 1, 0, 0], parts.total
    which = [Component(1, 0)]
    torch.testing.assert_close(ablate(parts, which, "zero"), total - heads)
    torch.testing.assert_close(ablate(parts, which, "mean"), total - heads + heads.mean(0))
    others = ablate(parts, which, "resample", seed=1) - (total - heads)
    distances = torch.cdist(others, heads)
    assert sorted(distances.argmin(1).tolist()) == list(range(6))  # Each image's once.
    assert float(distances.min(1).values.max()) < 1e-5
    with pytest.raises(InputError, match=r"^There is no ablation 'max'; there is zero, mean and resample"):
        unchecked(ablate)(parts, which, "max")
    torch.testing.assert_close(ablate(parts, [Component(-1, None)], "zero"), total - parts.mlps[:, 0])
    for bad in (Component(2, None), Component(-2, None), Component(0, 2), Component(0, -1)):
        with pytest.raises(InputError, match="there are 2 layers of 2 heads"):
            ablate(parts, [bad], "zero")


def test_a_property_is_no_more_texts_than_directions() -> None:
    parts = _decomposition()
    assert len(rank_components(parts, torch.eye(3)).scores) == 7
    with pytest.raises(InputError, match=r"^A property is at most 3 texts here; 4 were given\.$"):
        rank_components(parts, torch.randn(4, 3))
    with pytest.raises(InputError, match=r"^Texts are 4 wide and components 3; align the components first"):
        unchecked(rank_components)(parts, torch.randn(2, 4))


def test_components_are_aligned_with_embeddings_of_the_same_images() -> None:
    for n in (5, 7):
        with pytest.raises(InputError, match=f"^6 images were decomposed and {n} embeddings given"):
            unchecked(align)(_decomposition(), torch.randn(n, 4))
    found = align(_decomposition(), torch.randn(6, 4), epochs=1)
    assert found(_decomposition()).shape == (6, 7, 4)


@pytest.mark.parametrize("method", ["pca", "nmf"])
def test_concepts_are_those_of_scikit_learn(method: Any) -> None:
    states = torch.rand(30, 6, generator=torch.Generator().manual_seed(0))
    found = concept_dictionary(states, 3, method=method, seed=1, max_iter=1000)
    data = states.numpy()
    own = PCA(3, random_state=1) if method == "pca" else NMF(3, random_state=1, max_iter=1000)
    amounts = own.fit_transform(data)
    np.testing.assert_allclose(found.concepts, own.components_, rtol=1e-5, atol=1e-6)
    rebuilt = own.inverse_transform(amounts)
    lost = ((data - rebuilt) ** 2).sum() / ((data - data.mean(0)) ** 2).sum()
    assert found.explained == pytest.approx(1 - lost, abs=1e-5)
    strongest = [{int(i) for i in row.topk(5).indices} for row in torch.tensor(amounts).T]
    if method == "nmf":
        assert [{int(i) for i in row} for row in found.top_images] == strongest


def test_concepts_are_no_more_than_states_and_nmf_s_states_are_not_negative() -> None:
    states = torch.rand(4, 6)
    for n in (0, 5):
        with pytest.raises(InputError, match=f"^{n} concepts of 4 states: there can be 1 to 4"):
            concept_dictionary(states, n, method="kmeans")
    assert len(concept_dictionary(states, 1, method="kmeans", n_images=1).concepts) == 1
    assert len(concept_dictionary(states, 4, method="pca", n_images=1).concepts) == 4
    edge = states.clone()
    edge[0, 0] = 0
    concept_dictionary(edge, 2, method="nmf", n_images=1, max_iter=2000)
    edge[0, 0] = -1e-3
    with pytest.raises(InputError, match=r'^"nmf" takes states that are nowhere negative; use "semi_nmf"'):
        concept_dictionary(edge, 2, method="nmf")
    with pytest.raises(
        InputError, match=r"^There is no method 'ica'; there is semi_nmf, kmeans, pca and nmf"
    ):
        unchecked(concept_dictionary)(states, 2, method="ica")


def test_there_is_something_to_decompose_in_shares_that_there_are() -> None:
    model = mm.HookedModel(tiny.clip().model)
    with pytest.raises(InputError, match=r"^There is nothing to decompose: no image or text was given\.$"):
        decompose(model, images=[])
    with pytest.raises(InputError, match=r"^There are no 'half' shares; there are 'exact' and 'uniform'"):
        next(unchecked(decompositions)(model, images=tiny.pixels(), shares="half"))
    for shares in ("exact", "uniform"):
        assert len(decompose(model, images=tiny.pixels(1), shares=shares).own) == 1  # type: ignore[arg-type]


def test_effects_and_maps_are_of_images() -> None:
    model = mm.HookedModel(tiny.clip().model)
    with pytest.raises(InputError, match=r"^There is no image\.$"):
        second_order(model, images=[], layer=0)
    assert len(second_order(model, images=tiny.pixels(1), layer=0).amounts) == 1
    texts = torch.randn(3, 16)
    with pytest.raises(InputError, match=r"^There is no image to segment\.$"):
        _maps(model, [], texts, None, 4)
    assert _maps(model, tiny.pixels(1), texts, None, 4).grid == (2, 2)
    with pytest.raises(InputError, match=r"^The texts are 15 wide; the embedding is 16\.$"):
        _maps(model, tiny.pixels(1), texts[:, :15], None, 4)


def test_heads_are_named_by_several_images_and_texts_in_their_space(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mm.HookedModel(tiny.clip().model)
    words = Vocabulary(("a", "b"), ("a", "b"), ("any", "any"))
    monkeypatch.setattr(naming, "embed_texts", lambda model, texts: torch.randn(16, 15))
    with pytest.raises(InputError, match=r"^Heads are named by what varies between images; 1 is not enough"):
        naming.name_heads(model, list(tiny.pixels(1)), words)
    with pytest.raises(InputError, match=r"^Texts are 15 wide and this tower's summary 16: no joint space"):
        naming.name_heads(model, list(tiny.pixels(2)), words)


@pytest.mark.parametrize(("patch", "n_axes", "refused"), [("p", 5, True), ("p", 4, False), (None, 5, False)])
def test_a_tower_of_pixels_takes_images_and_no_tiles(patch: str | None, n_axes: int, refused: bool) -> None:
    parts: Any = SimpleNamespace(
        name="vision", tower=SimpleNamespace(input_name="x", record=SimpleNamespace(patch=patch))
    )
    inputs = {"x": torch.zeros(*[2] * n_axes)}
    if not refused:
        unchecked(_check_pixels)(parts, inputs)
        return
    with pytest.raises(
        InputError, match=r"^The vision tower by itself .* these are \(2, 2, 2, 2, 2\)\. Give"
    ):
        unchecked(_check_pixels)(parts, inputs)


class _Run(dict):
    output = None


def test_heads_of_a_group_read_the_values_of_that_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooled_run, "model_summary", lambda tower, output: torch.zeros(1, 5))
    run: dict[str, Tensor] = _Run({
        "attn.hook_pattern 0": torch.rand(1, 1, 4, 3),
        "attn.hook_v 0": torch.arange(12.0).reshape(1, 3, 2, 2),
        "hook_mlp_out 0": torch.rand(1, 1, 5),
        "hook_resid_pre 0": torch.rand(1, 1, 5),
        "hook_resid_post 0": torch.rand(1, 1, 1),
    })  # fmt: skip
    parts: Any = SimpleNamespace(
        n_layers=1, n_heads=4, pool="first", tower=None, site=lambda part, layer: f"{part} {layer}"
    )
    scale = torch.tensor([[0.5]])
    found = unchecked(_pooled)(parts, run, scale, scale, True)
    groups = run["attn.hook_v 0"][0]
    for head, group in enumerate((0, 0, 1, 1)):
        assert torch.equal(found.values[0, 0, :, head], groups[:, group])
    run["attn.hook_v 0"] = torch.rand(1, 3, 4, 2)
    found = unchecked(_pooled)(parts, run, scale, scale, True)
    assert torch.equal(found.values[0], run["attn.hook_v 0"])
    assert torch.equal(found.patterns[0], run["attn.hook_pattern 0"] / 2)


def test_rows_that_do_not_settle_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    atoms = torch.eye(12)  # More than join in one round.
    targets = torch.stack([torch.zeros(12), torch.ones(12), torch.eye(12)[3]])
    wanted = (targets - 0.05).clamp_min(0)  # What least squares with this penalty gives on unit axes.
    torch.testing.assert_close(sparse_coding.solve(targets, atoms, 0.1), wanted)
    monkeypatch.setattr(sparse_coding, "_ROUNDS", 2)
    with pytest.raises(RuntimeError, match=r"^1 of 3 rows did not settle; raise the penalty\.$"):
        sparse_coding.solve(targets, atoms, 0.1)
    monkeypatch.setattr(sparse_coding, "_ROUNDS", 3)
    torch.testing.assert_close(sparse_coding.solve(targets, atoms, 0.1), wanted)


def test_every_embedding_has_a_label_and_a_group() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    labels, groups = torch.tensor([0, 0, 0]), torch.tensor([0, 1, 1])
    assert group_accuracy(embeddings, torch.eye(2), labels, groups).values.tolist() == [1, 0.5]
    for n_labels, n_groups in ((2, 3), (3, 2)):
        told = f"^3 embeddings, {n_labels} labels, {n_groups} groups"
        with pytest.raises(InputError, match=told):
            unchecked(group_accuracy)(embeddings, torch.eye(2), labels[:n_labels], groups[:n_groups])


def test_a_span_is_of_texts_that_lie_along_what_varies() -> None:
    varies = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    along, across = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    assert text_span(varies, torch.cat([across, along]), n_texts=1).chosen == (1,)
    with pytest.raises(NothingVariesError, match=r"^None of the texts lies along what varies here; give"):
        text_span(varies, across, n_texts=1)
    with pytest.raises(NothingVariesError):
        text_span(torch.ones(3, 3), along, n_texts=1)
    for n, rank in ((0, 80), (3, 80), (2, 1)):
        with pytest.raises(
            InputError, match=f"^{n} texts were asked for; with 2 texts and rank {rank} it can"
        ):
            text_span(Moments.of(varies), torch.cat([across, along]), rank=rank, n_texts=n)


def test_a_vocabulary_s_groups_are_those_it_has() -> None:
    words = Vocabulary(("a red", "a box", "a blue"), ("red", "box", "blue"), ("colour", "shape", "colour"))
    assert words.of(["colour"]) == Vocabulary(("a red", "a blue"), ("red", "blue"), ("colour", "colour"))
    told = r"^No words are about place, size; there are words about colour, shape\.$"
    with pytest.raises(InputError, match=told):
        words.of(["size", "colour", "place"])
