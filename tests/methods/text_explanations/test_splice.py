"""SpLiCE: the weights are the optimum that scikit-learn finds one by one, and they mean what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.core.embed import embed, embed_texts
from methods_multimodal.text_explanations.sparse_coding import solve
from methods_multimodal.text_explanations.splice import (
    Splice,
    dictionary,
    image_mean,
    intervene,
    splice,
)
from methods_multimodal.text_explanations.vocabulary import vocabulary
from mm_adapters.zoo import world
from mm_adapters.zoo.measures import images_of, value_of


def problem(n: int = 12, concepts: int = 300, width: int = 48) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    words = torch.randn(concepts, 12, generator=g) @ torch.randn(12, width, generator=g)
    words = words + torch.randn(concepts, width, generator=g) + 1
    true = torch.zeros(n, concepts)
    for row in true:
        row[torch.randperm(concepts, generator=g)[:4]] = torch.rand(4, generator=g) + 0.2
    return true @ words + torch.randn(n, width, generator=g), words


def objective(weights: Tensor, words: Tensor, z: Tensor, l1: float) -> Tensor:
    return (weights @ words - z).square().sum(1) + l1 * weights.sum(1)


@pytest.mark.parametrize("l1", [0.02, 0.1, 0.3])
def test_weights_are_those_of_scikit_learns_lasso_on_the_published_objective(l1: float) -> None:
    embeddings, texts = problem()
    mean = torch.randn(48, generator=torch.Generator().manual_seed(1)) * 0.05
    found = splice(embeddings, dictionary(texts), l1=l1, image_mean=mean)
    unit = texts / texts.norm(dim=1, keepdim=True)
    centred = unit - unit.mean(0)
    d = (centred / centred.norm(dim=1, keepdim=True)).double()
    z = embeddings / embeddings.norm(dim=1, keepdim=True) - mean
    z = (z / z.norm(dim=1, keepdim=True)).double()
    for row in range(len(z)):
        lasso = Lasso(alpha=l1 / (2 * 48), positive=True, fit_intercept=False, max_iter=100_000, tol=1e-10)
        w = torch.tensor(lasso.fit(d.T.numpy(), z[row].numpy()).coef_)
        assert torch.equal(found.weights[row] > 0, w > 1e-7)
        assert (found.weights[row] - w).abs().max() <= 1e-4
        ours, theirs = (objective(v[None].double(), d, z[row], l1) for v in (found.weights[row], w))
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
        rebuilt = w @ d / (w @ d).norm().clamp_min(1e-12) + mean
        torch.testing.assert_close(
            found.reconstruction[row].double(), rebuilt / rebuilt.norm(), rtol=1e-4, atol=1e-4
        )


def test_twin_concepts_and_rows_without_any_are_no_trouble() -> None:
    embeddings, texts = problem()
    words = torch.nn.functional.normalize(torch.cat([texts, texts[:50], -texts]), dim=1)
    z = torch.nn.functional.normalize(torch.cat([embeddings, torch.zeros(1, 48)]), dim=1)
    for l1 in (0.01, 0.2, 3.0):
        weights = solve(z, words, l1)
        slope = 2 * (z - weights @ words) @ words.T - l1
        assert slope.max() <= 1e-4  # Nothing that has none asks for weight,
        assert (
            slope[weights > 0].abs().max() <= 1e-4 if (weights > 0).any() else l1 == 3.0
        )  # and what has is balanced.
        assert weights[-1].max() == 0


def test_what_was_mixed_is_found() -> None:
    g = torch.Generator().manual_seed(0)
    words = dictionary(torch.randn(500, 256, generator=g), [f"w{i}" for i in range(500)])
    z = 0.8 * words.directions[3] + 0.5 * words.directions[70]
    found = splice(z[None], words, l1=0.1, image_mean=torch.zeros(256))
    assert [name for name, _ in found.top(0, 2)] == ["w3", "w70"]
    removed = intervene(found, words, {"w3": 0.0})
    assert abs(float(removed.reconstruction[0] @ words.directions[3])) < 0.3
    assert float(removed.reconstruction[0] @ words.directions[70]) > 0.9


def test_a_target_sets_how_many_concepts_there_are() -> None:
    embeddings, texts = problem(40)
    for target in (3.0, 8.0):
        found = splice(embeddings, dictionary(texts), target=target)
        assert float(found.n_concepts) == pytest.approx(target, rel=0.15)
    with pytest.raises(mm.InputError, match="out of reach"):
        splice(embeddings, dictionary(texts), target=500.0)


def test_concepts_of_images_and_texts_are_true_of_them() -> None:
    model, words = mm.load("tiny-clip"), vocabulary("world")
    scenes = [world.scene(i, "test", kind="one") for i in range(150)]
    images = embed(model, images_of(scenes), "vision")
    concepts = dictionary(embed_texts(model, words.texts), words.texts)
    found = splice(images, concepts, l1=0.2, image_mean=image_mean(images))
    for attribute in ("colour", "background"):
        columns = [i for i, group in enumerate(words.groups) if group == attribute]
        said = found.weights[:, columns]
        has = said.max(1).values > 0
        heaviest = [words.texts[columns[i]] for i in said.argmax(1).tolist()]
        right = [value_of(s, attribute) in text for s, text in zip(scenes, heaviest, strict=True)]
        assert float(has.float().mean()) > 0.9, attribute
        assert np.mean([r for r, h in zip(right, has.tolist(), strict=True) if h]) > 0.9, attribute
    texts = embed_texts(model, ["a red object on a black background"])
    (first, _), (second, _) = splice(texts, concepts, l1=0.2, image_mean=concepts.text_mean).top(0, 2)
    assert {"red" in first or "red" in second, "black" in first or "black" in second} == {True}


def test_a_result_is_read_back_and_mistakes_are_said(tmp_path) -> None:
    embeddings, texts = problem()
    words = dictionary(texts)
    found = splice(embeddings, words, l1=0.1)
    back = Splice.load(found.save(tmp_path / "s.safetensors"))
    assert torch.equal(back.weights, found.weights)
    with pytest.raises(mm.InputError, match="above zero"):
        splice(embeddings, words, l1=0.0)
    with pytest.raises(mm.InputError, match="wide"):
        splice(embeddings[:, :5], words)
    with pytest.raises(mm.InputError, match="no such concept"):
        intervene(found, words, {"unicorn": 1.0})
