"""Which words in context an image token is most like: its state beside stored states of words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from methods_multimodal.core.embed import unit
from methods_multimodal.core.record import Record
from methods_multimodal.lenses._entries import Positions, entries_of, layer_names, states_at, stream_sites
from methods_multimodal.lenses.reading import LensReading
from methods_multimodal.lenses.tuned_lens import check_made_for, fingerprint
from mm_adapters import InputError, Model


@dataclass(frozen=True)
class ContextualIndex(Record):
    """Unit states of words in context, at several layers of a language tower.

    Entry i is word `words[word[i]]` in text `texts[text[i]]`, after layer `layer[i]` (-1: the embedding).
    """

    vectors: Float[Tensor, "entry d_model"]
    word: Int[Tensor, " entry"]
    layer: Int[Tensor, " entry"]
    text: Int[Tensor, " entry"]
    words: tuple[str, ...]
    texts: tuple[str, ...]
    weights: str
    tower: str = "language"

    def centred(self) -> Float[Tensor, "entry d_model"]:
        """The unit vectors without the mean of their layer."""
        vectors = self.vectors.clone()
        for layer in self.layer.unique():
            of_layer = self.layer == layer
            vectors[of_layer] = unit(vectors[of_layer] - vectors[of_layer].mean(0))
        return vectors

    def nearest(
        self, states: Float[Tensor, "state d_model"], k: int = 5
    ) -> tuple[Float[Tensor, "state k"], Int[Tensor, "state k"]]:
        """The most similar entries of each state: cosines, and their numbers."""
        cosines = unit(states.float()) @ self.vectors.to(states.device).T
        best, entries = cosines.topk(min(k, len(self.vectors)), -1)
        return best, entries


def contextual_index(
    model: Model,
    batches: Iterable[Mapping[str, Any]],
    *,
    layers: Sequence[int] | None = None,
    per_word: int = 16,
    tower: str = "language",
) -> ContextualIndex:
    """Stores the states of a corpus' words, in context, at the layers asked for.

    A word's state is that of its last token. Of each word and layer the first `per_word` are stored, so the
    index grows with the vocabulary, not with the corpus.

    Args:
        model: One with a language tower and its tokenizer.
        batches: The model's own arguments for the texts of a corpus, with images or without.
        layers: After which layers, -1 for the embedding; all of them without.
        per_word: How many contexts of a word are stored.
        tower: The language tower's name.

    Source: LatentLens, 2026, arXiv 2602.00462 (contextual states of several layers in one index).
    Raises: MissingSiteError if the tower has no one stream; InputError without words or tokenizer, or for a
    layer that there is not.
    """
    view = model.check_tower(tower)
    sites = stream_sites(model, view)
    numbers = list(range(-1, len(sites) - 1)) if layers is None else [int(i) for i in layers]
    for layer in numbers:
        if not -1 <= layer < len(sites) - 1:
            raise InputError(f"There is no layer {layer}: layers are -1 (the embedding) to {len(sites) - 2}.")
    wanted = [sites[layer + 1] for layer in numbers]
    words: dict[str, int] = {}
    counts: dict[str, int] = {}
    texts: list[str] = []
    vectors, word, text = [], [], []
    for batch in batches:
        layout = model.layout(**batch)[tower]
        places: list[tuple[int, int, str]] = []
        for row, entries in enumerate(layout.words):
            for entry in entries:
                name = entry.text.casefold()
                if entry.positions and counts.get(name, 0) < per_word:
                    counts[name] = counts.get(name, 0) + 1
                    places.append((row, entry.positions[-1], name))
        if not places:
            continue
        rows = {row: len(texts) + i for i, row in enumerate(sorted({row for row, _, _ in places}))}
        texts += [layout.texts[row] if layout.texts else "" for row in rows]
        at = entries_of(model, batch, "all", tower)
        numbered = {
            pair: i for i, pair in enumerate(zip(at.rows.tolist(), at.positions.tolist(), strict=True))
        }
        states = states_at(model, batch, wanted, at)
        vectors.append(unit(states[[numbered[row, p] for row, p, _ in places]]))
        word += [words.setdefault(name, len(words)) for _, _, name in places]
        text += [rows[row] for row, _, _ in places]
    if not vectors:
        raise InputError("The corpus has no words: give the model's arguments for texts.")
    stacked = torch.cat(vectors)
    n = stacked.shape[1]
    return ContextualIndex(
        vectors=stacked.flatten(0, 1),
        word=torch.tensor(word).repeat_interleave(n),
        layer=torch.tensor(numbers).repeat(len(word)),
        text=torch.tensor(text).repeat_interleave(n),
        words=tuple(words),
        texts=tuple(texts),
        weights=fingerprint(view, head=False),
        tower=tower,
    )


def latent_lens(
    model: Model,
    inputs: Mapping[str, Any],
    index: ContextualIndex,
    *,
    position: Positions = "image",
    words: Sequence[str] | None = None,
    centred: bool = False,
) -> LensReading:
    """Each word's cosine with the states at chosen positions: the largest over its contexts and their layers.

    Args:
        model: The one that the index was made with.
        inputs: The model's own arguments.
        index: Words in context.
        position: Which positions are read, as in `logit_lens`.
        words: The candidates; all words of the index without.
        centred: Whether the mean over the positions read, and that over the index' entries of a layer, is
            taken off first: states share a direction that says nothing of the word and may outweigh the rest.

    Source: LatentLens, 2026, arXiv 2602.00462
    Raises: MissingSiteError if the tower has no one stream, or no position the role; InputError for an index
    of other weights, or words that it does not have.
    """
    view = model.check_tower(index.tower)
    sites = stream_sites(model, view)
    check_made_for(view, index.weights, "index", head=False)
    names = index.words if words is None else tuple(w.casefold() for w in words)
    unknown = [name for name in names if name not in index.words]
    if unknown:
        raise InputError(f"The index has no {unknown[0]!r}; it has {len(index.words)} words of its corpus.")
    at = entries_of(model, inputs, position, index.tower)
    states = states_at(model, inputs, sites, at)
    states = unit(states - states.mean(0)) if centred else unit(states)
    vectors = (index.centred() if centred else index.vectors).to(states)
    word = index.word.to(states.device)
    scores = []
    for state in states.unbind(1):
        best = torch.full((len(state), len(index.words)), -1.0, device=state.device)
        scores.append(best.scatter_reduce(1, word.expand(len(state), -1), state @ vectors.T, "amax"))
    stacked = torch.stack(scores, 1)
    return LensReading(
        scores=stacked[..., [index.words.index(name) for name in names]],
        total=None,
        lens="latent",
        unit="cosine",
        layers=layer_names(len(sites)),
        candidates=names,
        **at.about,
    )
