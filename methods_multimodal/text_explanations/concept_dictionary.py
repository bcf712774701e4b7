"""What a language tower holds about one word, as a dictionary of concepts grounded in words and images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF, PCA, DictionaryLearning
from torch import Tensor

from methods_multimodal.core.record import Record
from mm_adapters import InputError, Model, Read

Method = Literal["semi_nmf", "kmeans", "pca", "nmf"]


@dataclass(frozen=True)
class ConceptDictionary(Record):
    """Concepts of a set of token states: each a direction, with how much of it every image has.

    `words` are the tokens that a concept, read by the model's own unembedding, raises most; `top_images`
    the images that have most of it.
    """

    concepts: Float[Tensor, "concept d_model"]
    amounts: Float[Tensor, "image concept"]
    top_images: Int[Tensor, "concept top"]
    words: tuple[tuple[str, ...], ...]
    explained: float


def token_states(
    model: Model,
    inputs: Iterable[Mapping[str, Any]],
    layer: int,
    *,
    position: int = -1,
    tower: str = "language",
) -> Float[Tensor, "image d_model"]:
    """The residual stream after one layer at one position, for every batch of the model's inputs.

    With the prompt written up to where the word of interest comes next, position -1 holds what makes it.
    """
    site = f"{tower}.blocks.{layer}.hook_resid_post"
    read = Read(site, reduce=lambda x: x[:, position].float())
    return torch.cat([model.run(batch, read=[read])[site] for batch in inputs])


def concept_dictionary(
    states: Float[Tensor, "image d_model"],
    n_concepts: int = 20,
    *,
    method: Method = "semi_nmf",
    unembed: Float[Tensor, "d_model token"] | None = None,
    tokens: Sequence[str] | None = None,
    n_words: int = 10,
    n_images: int = 5,
    alpha: float = 1.0,
    max_iter: int = 300,
    seed: int = 0,
) -> ConceptDictionary:
    """Learns concepts that token states are made of, and grounds each in words and in images.

    "semi_nmf": non-negative, sparse amounts of directions of any sign (scikit-learn's DictionaryLearning);
    "kmeans": the centres, amounts 1 / (1 + distance); "pca"; "nmf" for states that are not negative.

    Args:
        states: What `token_states` gives: one state for each image.
        n_concepts: How many concepts are learned.
        method: "semi_nmf", "kmeans", "pca" or "nmf".
        unembed: What maps a state to logits: `model.towers["language"].unembedding`.
        tokens: The string of each logit's token; without it and `unembed` there are no words.
        n_words: How many words a concept has.
        n_images: How many images a concept has.
        alpha: How much sparse amounts count ("semi_nmf").
        max_iter: The most rounds of "semi_nmf" and "nmf".
        seed: Of what is random in the learning.

    Source: Parekh et al. 2024, arXiv 2406.08074, section 3.
    Raises: InputError if there are fewer states than concepts, or no such method.
    """
    if not 0 < n_concepts <= len(states):
        raise InputError(f"{n_concepts} concepts of {len(states)} states: there can be 1 to {len(states)}.")
    data = states.detach().float().cpu().numpy()
    mean: Any = 0.0
    # scikit-learn's annotations are narrower than what it takes.
    same: dict[str, Any] = {"random_state": seed}
    concepts: Any
    if method == "semi_nmf":
        same |= {"fit_algorithm": "cd", "transform_algorithm": "lasso_cd"}
        same |= {"positive_code": True, "alpha": alpha}
        learner: Any = DictionaryLearning(n_concepts, max_iter=max_iter, **same)
        amounts, concepts = learner.fit_transform(data), learner.components_
    elif method == "kmeans":
        same["n_init"] = 10
        learner = KMeans(n_concepts, **same).fit(data)
        amounts, concepts = 1 / (1 + learner.transform(data)), learner.cluster_centers_
    elif method == "pca":
        learner = PCA(n_concepts, **same).fit(data)
        amounts, concepts, mean = learner.transform(data), learner.components_, learner.mean_
    elif method == "nmf":
        if data.min() < 0:
            raise InputError('"nmf" takes states that are nowhere negative; use "semi_nmf".')
        same |= {"n_components": n_concepts, "max_iter": max_iter}
        learner = NMF(**same)
        amounts, concepts = learner.fit_transform(data), learner.components_
    else:
        raise InputError(f"There is no method {method!r}; there is semi_nmf, kmeans, pca and nmf.")
    rebuilt = concepts[amounts.argmax(1)] if method == "kmeans" else amounts @ concepts + mean
    explained = 1 - float(((data - rebuilt) ** 2).sum() / ((data - data.mean(0)) ** 2).sum())
    directions, amounts_of = torch.tensor(concepts).float(), torch.tensor(amounts).float()
    return ConceptDictionary(
        concepts=directions,
        amounts=amounts_of,
        top_images=amounts_of.topk(min(n_images, len(amounts_of)), dim=0).indices.T.contiguous(),
        words=() if unembed is None or tokens is None else _words(directions, unembed, tokens, n_words),
        explained=explained,
    )


def _words(
    concepts: Tensor, unembed: Tensor, tokens: Sequence[str], n_words: int
) -> tuple[tuple[str, ...], ...]:
    """The tokens each concept raises most beside the average concept; those without a letter are left out."""
    logits = concepts.to(unembed) @ unembed
    logits = logits - logits.mean(0) if len(concepts) > 1 else logits
    words = []
    for row in logits.argsort(dim=1, descending=True).tolist():
        spoken = (str(tokens[i]).strip() for i in row)
        words.append(tuple(dict.fromkeys(w for w in spoken if any(c.isalpha() for c in w)))[:n_words])
    return tuple(words)
