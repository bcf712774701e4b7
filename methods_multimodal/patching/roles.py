"""Which positions of a tower are what: image, object, its surroundings, question, last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from methods_multimodal.core.generators import generator
from methods_multimodal.core.model import check_sites
from methods_multimodal.core.positions import in_rows
from methods_multimodal.core.record import Record
from mm_adapters import InputError, MissingSiteError, Model, Read, TokenLayout

# Half a patch beyond an object's own patches, so that each patch that touches one of them counts.
_TOUCHING = 0.5


@dataclass(frozen=True)
class TokenRoles(Record):
    """A mask [row, pos] of each role's positions in one tower; positions may have several roles."""

    masks: dict[str, Bool[Tensor, "row pos"]]
    tower: str

    def __getitem__(self, role: str) -> Bool[Tensor, "row pos"]:
        """The positions of a role. Raises: InputError if there is no such role."""
        if role not in self.masks:
            raise InputError(
                f"The {self.tower} tower's positions have no role {role!r} here; there is "
                f"{', '.join(self.masks)}."
            )
        return self.masks[role]

    def matched(self, role: str, among: str, *, seed: int = 0) -> Bool[Tensor, "row pos"]:
        """As many positions as a role has, in each row, drawn among those of another: its control.

        Raises: InputError if a row has too few.
        """
        rng = generator(seed)
        wanted, pool = self[role], self[among] & ~self[role]
        drawn = torch.zeros_like(wanted)
        for row, (n, free) in enumerate(zip(wanted.sum(1).tolist(), pool, strict=True)):
            places = free.nonzero()[:, 0]
            if len(places) < n:
                raise InputError(
                    f"Row {row} has {n} positions of {role!r} and {len(places)} others of {among!r}: too "
                    "few to draw as many. Draw among more, or leave that row out."
                )
            drawn[row, places[torch.randperm(len(places), generator=rng)[:n]]] = True
        return drawn


def token_roles(
    model: Model,
    inputs: Mapping[str, Any],
    *,
    tower: str = "language",
    objects: Bool[Tensor, "row height width"] | None = None,
    image: int = 0,
    words: Sequence[str] = (),
) -> TokenRoles:
    """The roles of a tower's positions for these inputs, of those that occur.

    Of an image: "image" (all its positions), and with `objects` "object" (the patches that it touches),
    "buffer" (the patches around those) and "background" (all others). Of a text: "before" and "question"
    (before and after the image; all of it where there is no image), and "last" (each row's last attended
    position). Each word of `words` is a role of its own.

    Args:
        model: What reads the inputs.
        inputs: Raw or prepared.
        tower: Whose positions.
        objects: Which pixels the object covers, of any size, for each row.
        image: Which image of the row the object is in.
        words: Words or phrases that all rows have.

    Source: Neo et al. 2024, arXiv 2410.07149 (object, buffer); Geva et al. 2023, arXiv 2304.14767 (last).
    Raises: MissingSiteError if there is no layout of the tower; InputError if an object touches no patch, or
        rows differ in number; WordNotFoundError if a row lacks a word.
    """
    layout = model.layout(**inputs)[model.check_tower(tower).name]
    n_rows, n_pos = layout.n_rows, layout.n_pos
    masks = {
        "image": torch.tensor([[i is not None for i in row] for row in layout.image_index]).reshape(-1, n_pos)
    }
    if not layout.image_index:
        masks = {"image": torch.zeros(n_rows, n_pos, dtype=torch.bool)}
    if objects is not None:
        masks |= _of_objects(layout, objects, image)
        masks["background"] = masks["image"] & ~masks["object"] & ~masks["buffer"]
    if model.check_tower(tower).role in ("text", "language"):
        masks |= _of_text(model, inputs, layout, tower, masks["image"])
    for word in words:
        masks[word] = torch.zeros(n_rows, n_pos, dtype=torch.bool)
        for row in range(n_rows):
            masks[word][row, layout.where(word, row)] = True
    return TokenRoles({role: mask for role, mask in masks.items() if bool(mask.any())}, tower)


def register_positions(
    model: Model, inputs: Mapping[str, Any], *, tower: str = "language", above: float = 3.0
) -> Bool[Tensor, "row pos"]:
    """Image positions whose state at the tower's entry is an outlier in length: where a model keeps notes.

    Those whose length exceeds the mean over the row's image positions by `above` standard deviations.

    Source: Darcet et al. 2023, arXiv 2309.16588; Neo et al. 2024, arXiv 2410.07149 (as a preset of a
        knockout).
    Raises: MissingSiteError if the tower has no blocks or its layout no image.
    """
    site = f"{tower}.blocks.0.hook_resid_pre"
    check_sites(model, [site])
    masks = token_roles(model, inputs, tower=tower).masks
    if "image" not in masks:
        raise no_image(tower)
    run = model.run(inputs, read=[Read(site, reduce=lambda x: x.float().norm(dim=-1))])
    return outliers(run[site], masks["image"].to(run[site].device), above)


def no_image(tower: str) -> MissingSiteError:
    """What to raise where a tower's positions hold no image."""
    return MissingSiteError(
        f"The {tower} tower's layout has no 'image' role in these inputs: none of its positions is of an "
        "image. Give inputs with an image, or another tower."
    )


def outliers(
    lengths: Float[Tensor, "row pos"], among: Bool[Tensor, "row pos"], above: float
) -> Bool[Tensor, "row pos"]:
    """Which of each row's values exceed the mean of those `among` by so many standard deviations."""
    n = among.sum(1, keepdim=True).clamp(min=1)
    mean = (lengths * among).sum(1, keepdim=True) / n
    spread = (((lengths - mean).square() * among).sum(1, keepdim=True) / n).sqrt()
    return among & (lengths > mean + above * spread)


def _of_objects(layout: TokenLayout, objects: Tensor, image: int) -> dict[str, Tensor]:
    if len(objects) != layout.n_rows:
        raise InputError(f"objects: {len(objects)} masks for {layout.n_rows} rows; give one for each.")
    masks = {
        name: torch.zeros(layout.n_rows, layout.n_pos, dtype=torch.bool) for name in ("object", "buffer")
    }
    for row in range(layout.n_rows):
        boxes = {
            pos: layout.box(pos, row=row)
            for pos, at in enumerate(layout.patches[row] if layout.patches else ())
            if at is not None and layout.image_index[row][pos] == image
        }
        own = {pos for pos, box in boxes.items() if _covers(objects[row], box)}
        if not own:
            raise InputError(
                f"objects: row {row}'s mask touches no patch of image {image}: it covers "
                f"{int(objects[row].sum())} pixels, and the row has {len(boxes)} patches of that image."
            )
        masks["object"][row, list(own)] = True
        around = [pos for pos in boxes.keys() - own if any(_touch(boxes[pos], boxes[o]) for o in own)]
        masks["buffer"][row, around] = True
    return masks


def _covers(mask: Tensor, box: tuple[float, float, float, float]) -> bool:
    height, width = mask.shape
    top, left, bottom, right = box
    rows = slice(int(top * height), max(int(top * height) + 1, round(bottom * height)))
    columns = slice(int(left * width), max(int(left * width) + 1, round(right * width)))
    return bool(mask[rows, columns].any())


def _touch(one: tuple[float, float, float, float], two: tuple[float, float, float, float]) -> bool:
    down, across = _TOUCHING * (one[2] - one[0]), _TOUCHING * (one[3] - one[1])
    return (
        one[0] - down < two[2]
        and two[0] - down < one[2]
        and one[1] - across < two[3]
        and two[1] - across < one[3]
    )


def _of_text(
    model: Model, inputs: Mapping[str, Any], layout: TokenLayout, tower: str, image: Tensor
) -> dict[str, Tensor]:
    names = ("before", "question", "last")
    masks = {name: torch.zeros(layout.n_rows, layout.n_pos, dtype=torch.bool) for name in names}
    last = torch.as_tensor(in_rows(model, inputs, -1, tower).index).expand(layout.n_rows).tolist()
    for row, end in enumerate(last):
        of_image = image[row].nonzero()[:, 0].tolist()
        text = [
            p for p in range(layout.n_pos) if layout.roles[row][p] in ("word", "start", "end") and p < end
        ]
        first = of_image[0] if of_image else -1
        masks["before"][row, [p for p in text if p < first]] = True
        masks["question"][row, [p for p in text if p > first and not image[row, p]]] = True
        masks["last"][row, end] = True
    return masks
