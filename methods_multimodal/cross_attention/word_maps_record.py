"""The record of every word's map: where it is kept, read and measured."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.cross_attention import _recipes as recipes


@dataclass(frozen=True)
class WordMaps(Record):
    """Attention from each latent position to each word, under the prompt (not the empty one).

    `by_grid["8x8"]` holds the layers of that resolution: the probability that goes to the word,
    summed over its tokens, averaged over steps and heads where those were not kept (their axes then
    have size one). `words` are each prompt's; a prompt with fewer words than another has zeros at
    the end. `affinity` is the self-attention between the pixels of `affinity_grid`, averaged. `all_words`
    holds, for each of `by_grid`, the mean over every word of the prompt, with a map here or not.
    """

    by_grid: dict[str, Float[Tensor, "step _ head image word _ _"]]
    words: tuple[tuple[str, ...], ...]
    n_tokens: tuple[tuple[int, ...], ...]
    layers: tuple[tuple[int, ...], ...]
    stages: tuple[tuple[str, ...], ...]
    latent: tuple[int, int]
    n_steps: int
    affinity: Float[Tensor, "image _ _"]
    affinity_grid: tuple[int, int]
    all_words: dict[str, Float[Tensor, "step _ head image _ _"]] = field(default_factory=dict)

    @property
    def n_images(self) -> int:
        return next(iter(self.by_grid.values())).shape[3]

    def prompt_of(self, image: int) -> int:
        """Which prompt an image is of."""
        return image * len(self.words) // self.n_images

    def words_of(self, image: int = 0) -> tuple[str, ...]:
        """The words of an image's prompt, in the order of its maps."""
        return self.words[self.prompt_of(image)]

    def at(
        self, recipe: str = "mean", steps: slice = slice(None), grid: str | None = None
    ) -> Float[Tensor, "image word height width"]:
        """One map a word at the size of the latent, by one of these recipes:

        "mean": the mean over layers of each resolution, then over resolutions: a probability.
        "daam": the sum over steps, the mean over heads and layers, as the `daam` package (0.2.0) does.
        "relative": the attention to the word over the mean attention to the prompt's words, its logarithm,
        every layer standardised, averaged; in no unit. It tells words apart best.
        "spread": every layer standardised, averaged, and spread over the pixels that attend to each
        other; in no unit. It follows the edges of the drawn things best, and makes most words' maps the
        thing or what is around it: a word that names nothing looks like one that does.

        Raises: InputError if what the recipe needs was not kept.
        """
        return recipes.make(self, recipe, steps, grid)

    def heat(self, word: str, image: int = 0, recipe: str = "relative") -> Float[Tensor, "height width"]:
        """One word's map in one image. Raises: WordNotFoundError listing the words there are."""
        return self.at(recipe)[image, recipes.index_of(word, self.words_of(image))]

    def by_step(self) -> Float[Tensor, "step image word height width"]:
        """The mean over resolutions at each step. Raises: InputError if steps were not kept."""
        recipes.need(self, "step")
        return torch.stack([self.at(steps=slice(i, i + 1)) for i in range(self.n_steps)])

    def strength(self) -> Float[Tensor, "step image word"]:
        """The attention to each word at each step: the mean over pixels, then over resolutions."""
        means = [maps.mean((1, 2, -1, -2)) for maps in self.by_grid.values()]
        return torch.stack(means).mean(0)
