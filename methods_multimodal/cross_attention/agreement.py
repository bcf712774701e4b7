"""How well maps agree: a word's with the pixels that change, and with those of words that name nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.statistics import spearman

# English words that name no thing and no quality: what their maps show is no word's own.
ARTICLES = ("a", "an", "the", "this", "that", "these", "those", "its", "their")
JOINING = ("of", "in", "on", "at", "by", "to", "from", "with", "for", "and", "or", "as", "is", "are")
FUNCTION_WORDS = frozenset((*ARTICLES, *JOINING))


def rank_agreement(
    one: Float[Tensor, "map _ _"], two: Float[Tensor, "map height width"]
) -> Float[Tensor, " map"]:
    """Spearman's correlation over pixels of each map with the same of `two`, at the size of `two`.

    It asks for the same order of pixels, not for the same values; NaN where a map is one value everywhere.
    """
    sized = F.interpolate(one[:, None].float(), size=two.shape[-2:], mode="bilinear", align_corners=False)
    return spearman(sized[:, 0].flatten(1).mT.double(), two.flatten(1).mT.double()).float()


def function_words(words: Sequence[str]) -> list[int]:
    """Which of these words are function words, by an English list."""
    return [i for i, word in enumerate(words) if word.casefold() in FUNCTION_WORDS]


def baseline_agreement(
    maps: Float[Tensor, "word height width"], words: Sequence[str]
) -> tuple[Float[Tensor, " word"], tuple[tuple[str, ...], ...]]:
    """How each word's map agrees with the mean map of the prompt's function words, and which those are.

    A word's own map is left out of its baseline. Without any other function word the baseline is the mean
    over all other words, and with no other word it is empty and the agreement NaN. Maps are standardised
    before they are averaged. Near 1, a map shows nothing that is this word's own; near -1, that in reverse.
    """
    flat = maps.flatten(1).double()
    flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True).clamp_min(1e-12)
    functional = function_words(words)
    values, names = [], []
    for i in range(len(words)):
        others = [j for j in functional if j != i] or [j for j in range(len(words)) if j != i]
        names.append(tuple(words[j] for j in others))
        values.append(
            spearman(flat[i][:, None], flat[others].mean(0)[:, None])[0]
            if others
            else torch.tensor(float("nan"), dtype=torch.float64)
        )
    return torch.stack(values).float(), tuple(names)
