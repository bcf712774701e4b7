"""Whether a model reads the words of a vocabulary, or embeds them as it does letters drawn at random."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.embed import embed_texts
from methods_multimodal.core.record import Record
from methods_multimodal.text_explanations.vocabulary import Vocabulary
from mm_adapters import Model

_WORD = re.compile(r"\w+")
# Random strings that words are compared with, at least.
_STRINGS = 200
# Letters that are drawn for one string, at most: each may be a token, and models read few.
_LETTERS = 24


@dataclass(frozen=True)
class Readability(Record):
    """Each text beside the same text with its own words replaced by random letters, as many (24 at most).

    `distance[text]` is that of the text's unit vector to the nearest of such strings of letters,
    `of_letters[string]` that of each string to the nearest other. A word that the model does not know falls
    into letters and lands among them. `p[text]` is the share of strings at least as far off (with one added
    to both counts). `spread` is the mean squared distance of the texts from their mean, `spread_of_letters`
    that of the strings.
    """

    texts: tuple[str, ...]
    distance: Float[Tensor, " text"]
    of_letters: Float[Tensor, " string"]
    p: Float[Tensor, " text"]
    spread: float
    spread_of_letters: float

    def unread(self, level: float = 0.05) -> tuple[int, ...]:
        """The numbers of the texts that cannot be told from random letters at this level."""
        return tuple((self.p > level).nonzero().flatten().tolist())


def readability(model: Model, words: Vocabulary, *, seed: int = 0) -> Readability:
    """Compares a vocabulary's embeddings with those of random letters in the same sentences.

    A text's own word is what `words.words` says, or what not all texts of its group have in common. Letters
    are drawn from those that the own words are written in.
    """
    rng = random.Random(seed)
    spans = own_words(words)
    own = "".join(text[a:b] for text, at in zip(words.texts, spans, strict=True) for a, b in at).lower()
    letters = sorted({c for c in own if c.isalpha()}) or sorted(set("abcdefghijklmnopqrstuvwxyz"))
    times = -(-_STRINGS // len(words))
    strings = [
        _scrambled(text, at, letters, rng)
        for text, at in zip(words.texts, spans, strict=True)
        for _ in range(times)
    ]
    strings = list(dict.fromkeys(strings))
    texts, random_texts = embed_texts(model, words.texts).cpu(), embed_texts(model, strings).cpu()
    distance = torch.cdist(texts, random_texts).amin(1)
    between = torch.cdist(random_texts, random_texts).fill_diagonal_(torch.inf)
    of_letters = between.amin(1)
    as_far = (of_letters[None] >= distance[:, None]).sum(1)
    return Readability(
        texts=words.texts,
        distance=distance,
        of_letters=of_letters,
        p=(1 + as_far) / (1 + len(of_letters)),
        spread=_spread(texts),
        spread_of_letters=_spread(random_texts),
    )


def own_words(words: Vocabulary) -> list[list[tuple[int, int]]]:
    """Where in each text the words are that it does not share with all texts of its group."""
    shared: dict[str, set[str]] = {}
    for text, group in zip(words.texts, words.groups, strict=True):
        here = {w.lower() for w in _WORD.findall(text)}
        shared[group] = shared.get(group, here) & here
    spans = []
    for text, word, group in zip(words.texts, words.words, words.groups, strict=True):
        at = text.rfind(word) if word != text else -1
        if at >= 0:
            spans.append([(at, at + len(word))])
            continue
        found = [m.span() for m in _WORD.finditer(text)]
        own = [(a, b) for a, b in found if text[a:b].lower() not in shared[group]]
        spans.append(own or found)
    return spans


def _scrambled(text: str, spans: list[tuple[int, int]], letters: list[str], rng: random.Random) -> str:
    """The text with random letters for its own words; of long texts the last own words are left out."""
    parts, at, left = [], 0, _LETTERS
    for first, last in spans:
        n = min(last - first, left)
        drawn = "".join(rng.choice(letters) if c.isalnum() else c for c in text[first : first + n])
        parts += [text[at:first], drawn]
        at, left = last, left - n
    return "".join([*parts, text[at:]])


def _spread(vectors: Float[Tensor, "row width"]) -> float:
    return float((vectors - vectors.mean(0)).square().sum(1).mean())
