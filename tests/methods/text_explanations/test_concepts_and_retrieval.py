"""Concept dictionaries find planted atoms and true words; a head retrieves by what it means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mm_adapters as mm
from methods_multimodal.core.embed import embed_texts
from methods_multimodal.text_explanations.ablation import Component
from methods_multimodal.text_explanations.components import rank_components
from methods_multimodal.text_explanations.concept_dictionary import concept_dictionary, token_states
from methods_multimodal.text_explanations.decomposition import decompose
from methods_multimodal.text_explanations.retrieval import retrieve
from methods_multimodal.text_explanations.vocabulary import vocabulary
from mm_adapters.zoo import world
from mm_adapters.zoo.measures import images_of, value_of


@pytest.mark.filterwarnings("ignore:Objective did not converge")
@pytest.mark.parametrize("method", ["semi_nmf", "kmeans"])
def test_planted_atoms_are_found(method: str) -> None:
    g = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(4, 32, generator=g), dim=1)
    which = torch.randint(4, (300,), generator=g)
    amounts = torch.zeros(300, 4)
    amounts[torch.arange(300), which] = 8 + 4 * torch.rand(300, generator=g)
    states = amounts @ atoms + 0.02 * torch.randn(300, 32, generator=g)
    found = concept_dictionary(states, 4, method=method, alpha=0.1)  # type: ignore[arg-type]
    likeness = (torch.nn.functional.normalize(found.concepts, dim=1) @ atoms.T).abs()
    assert likeness.max(0).values.min() >= 0.985
    assert sorted(likeness.argmax(1).tolist()) == [0, 1, 2, 3]
    for concept, atom in enumerate(likeness.argmax(1).tolist()):
        assert (which[found.top_images[concept]] == atom).all()
    assert found.explained > 0.9


def test_concepts_of_an_answer_are_its_words_and_its_images() -> None:
    model = mm.load("tiny-llava")
    scenes = [world.scene(i, "test", kind="one", size="large") for i in range(80)]
    prompt = "question: what colour is the object? answer:"
    batches = [
        model.prepare(text=[prompt] * 20, images=images_of(scenes[start : start + 20]))
        for start in range(0, 80, 20)
    ]
    layer = model.language.cfg.n_layers - 1
    states = token_states(model, batches, layer)
    tokens = [model.language.to_single_str_token(i) for i in range(model.language.W_U.shape[1])]
    gain = model.language.ln_final.w.detach()
    found = concept_dictionary(
        states,
        8,
        method="kmeans",
        unembed=gain[:, None] * model.language.W_U.detach(),
        tokens=tokens,
        n_words=3,
    )
    right = []
    for concept in range(8):
        shown = [scenes[i].things[0].colour for i in found.top_images[concept].tolist()]
        most = max(set(shown), key=shown.count)
        right.append(most in found.words[concept])
    assert np.mean(right) >= 0.75, found.words


def test_a_head_that_means_colour_retrieves_by_colour_and_not_by_shape() -> None:
    model = mm.load("tiny-clip")
    scenes = [world.scene(i, "test", kind="one") for i in range(200)]
    pixels = model.prepare(images=images_of(scenes))["pixel_values"]
    found = decompose(model, images=pixels, tokens="sum", batch_size=100).unit()
    near = retrieve(found, Component(1, 0), images=found, n=6)
    assert near.images[:, 0].tolist() == list(range(200))  # Nothing is more like an image than itself.

    def agreement(images: torch.Tensor, attribute: str) -> float:
        own = [value_of(s, attribute) for s in scenes]
        return float(np.mean([own[i] == own[j] for i, row in enumerate(images.tolist()) for j in row[1:]]))

    assert agreement(near.images, "colour") > 0.8
    assert agreement(near.images, "shape") < 0.4
    by_shape = retrieve(found, Component(3, 1), images=found, n=6)
    assert agreement(by_shape.images, "shape") > agreement(near.images, "shape") + 0.3
    words = vocabulary("world").of(["colour"])
    texts = embed_texts(model, words.texts)
    heads = [c for c in rank_components(found, texts).components() if c.head is not None][:2]
    by_text = retrieve(found, heads, texts=texts, n=5)
    hits = [
        value_of(scenes[i], "colour") in words.texts[row]
        for row in range(8)
        for i in by_text.images[row].tolist()
    ]
    assert np.mean(hits) > 0.8
    with pytest.raises(mm.InputError, match="one of the two"):
        retrieve(found, Component(1, 0))
    with pytest.raises(mm.InputError, match="Name a component"):
        retrieve(found, [], images=found)
