"""Which rows of a denoiser's batch are whose, under classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Guided = Literal["cond", "uncond", "all"]


@dataclass(frozen=True)
class GuidanceRows:
    """Which rows of a denoiser's batch belong to which prompt, under classifier-free guidance.

    A pipeline repeats each prompt `images_per_prompt` times and, if `guided`, lays one such block
    for each name in `order`.
    """

    n_prompts: int
    images_per_prompt: int = 1
    guided: bool = True
    order: tuple[Guided, ...] = ("uncond", "cond")

    @property
    def n_rows(self) -> int:
        return self.n_images * (len(self.order) if self.guided else 1)

    @property
    def n_images(self) -> int:
        return self.n_prompts * self.images_per_prompt

    def rows(self, which: Guided = "all") -> slice:
        """The rows that are guided by the prompt, those that are not, or all.

        Raises: ValueError if there are no such rows, as "uncond" without guidance.
        """
        if which == "all":
            return slice(0, self.n_rows)
        blocks = self.order if self.guided else ("cond",)
        if which not in blocks:
            raise ValueError(
                f"This run has no {which!r} rows; it has {', '.join(blocks)}. Unconditional rows "
                "are there when the guidance scale is above one."
            )
        start = blocks.index(which) * self.n_images
        return slice(start, start + self.n_images)

    def row_of(self, prompt: int, image: int = 0, which: Guided = "cond") -> int:
        """The row of one prompt's image. Raises: IndexError if there is no such prompt or image."""
        if not (0 <= prompt < self.n_prompts and 0 <= image < self.images_per_prompt):
            raise IndexError(
                f"No image {image} of prompt {prompt}: there are {self.n_prompts} prompts with "
                f"{self.images_per_prompt} images each."
            )
        return self.rows(which).start + prompt * self.images_per_prompt + image
