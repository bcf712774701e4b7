"""Where in the image an answer's words are grounded: states of words beside states of image tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.embed import unit
from methods_multimodal.lenses._entries import entries_of, layer_names, stream_sites
from methods_multimodal.lenses.reading import LensReading
from mm_adapters import InputError, Model, Read

# The last position (-1), a phrase of each row, or some positions of each row.
Words = int | Sequence[str] | Sequence[Sequence[int]]
PatchBox = tuple[int, int, int, int]


def contextual_lens(
    model: Model, inputs: Mapping[str, Any], words: Words, *, tower: str = "language"
) -> LensReading:
    """The cosine of every image token's state with the mean state of some words of its row.

    Unlike an unembedding this compares states that both have seen context. Layers of the reading are those
    of the image tokens, candidates those of the words; which two to take is to be chosen on other data.

    Args:
        model: One whose language tower is given image tokens.
        inputs: The model's own arguments, the answer written out after the question.
        words: A phrase of each row ("circle"), some positions of each row, or -1 for each row's last.
        tower: The language tower's name.

    Source: Phukan et al. 2024, arXiv 2411.19187 (its score of a patch, at all pairs of layers).
    Raises: MissingSiteError if the tower has no one stream, or no image tokens; WordNotFoundError for a
    phrase that a row does not have; InputError for positions that there are not.
    """
    view = model.check_tower(tower)
    sites = stream_sites(model, view)
    at = entries_of(model, inputs, "image", tower)
    spans = _spans(model, inputs, words, tower)
    means = _Means(spans)

    def both(value: Tensor) -> Tensor:
        return torch.cat([at.of(value).float(), means(value.float())])

    run = model.run(inputs, read=[Read(s, reduce=both) for s in sites])
    image = unit(torch.stack([run[s][: len(at.rows)].detach() for s in sites], 1))
    text = unit(torch.stack([run[s][len(at.rows) :].detach() for s in sites], 1))
    return LensReading(
        scores=torch.einsum("eld,ecd->elc", image, text[at.rows.to(text.device)]),
        total=None,
        lens="contextual",
        unit="cosine",
        layers=layer_names(len(sites)),
        candidates=tuple(f"words at {name}" for name in layer_names(len(sites))),
        **at.about,
    )


def grounding_box(scores: Float[Tensor, "down across"], spread: float = 1.0) -> PatchBox:
    """The window of patches (top, left, bottom, right; the last two exclusive) that stands out most.

    It has the largest sum of what its patches are above the map's mean by more than `spread` standard
    deviations, over all windows of any size. NaN patches count as the mean.

    Source: Phukan et al. 2024, arXiv 2411.19187 (the best contiguous window).
    Raises: InputError for a map without numbers.
    """
    known = scores[~scores.isnan()].double()
    if not known.numel():
        raise InputError("This map has no numbers, so no window stands out.")
    above = scores.double().nan_to_num(float(known.mean())) - known.mean() - spread * known.std(correction=0)
    down, across = above.shape
    sums = torch.zeros(down + 1, across + 1, dtype=torch.float64, device=above.device)
    sums[1:, 1:] = above.cumsum(0).cumsum(1)
    top, bottom = torch.triu_indices(down + 1, down + 1, 1)
    left, right = torch.triu_indices(across + 1, across + 1, 1)
    bands = sums[bottom] - sums[top]
    windows = bands[:, right] - bands[:, left]
    best = int(windows.argmax())
    i, j = divmod(best, len(left))
    return int(top[i]), int(left[j]), int(bottom[i]), int(right[j])


def box_iou(one: PatchBox, other: PatchBox) -> float:
    """The area that two boxes share over that of both."""
    down = min(one[2], other[2]) - max(one[0], other[0])
    across = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0, down) * max(0, across)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return shared / (sum(areas) - shared)


class _Means:
    """The mean of a value over some positions of each row: [row, pos, ...] to [row, ...]."""

    def __init__(self, spans: Sequence[Tensor]) -> None:
        self.spans = spans

    def __call__(self, value: Tensor) -> Tensor:
        return torch.stack([value[r, at.to(value.device)].mean(0) for r, at in enumerate(self.spans)])


def _spans(model: Model, inputs: Mapping[str, Any], words: Words, tower: str) -> list[Tensor]:
    if isinstance(words, int):
        return list(entries_of(model, inputs, words, tower).positions[:, None])
    layout = model.layout(**inputs)[tower]
    if isinstance(words, str) or len(words) != layout.n_rows:
        raise InputError(f"There are {layout.n_rows} rows: give words of each, a phrase or positions.")
    spans = [layout.where(w, row) if isinstance(w, str) else list(w) for row, w in enumerate(words)]
    for row, span in enumerate(spans):
        if not span or not all(0 <= p < layout.n_pos for p in span):
            raise InputError(f"Row {row}: positions are 0 to {layout.n_pos - 1}, and {span} were given.")
    return [torch.tensor(span) for span in spans]
