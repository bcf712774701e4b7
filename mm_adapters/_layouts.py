"""What each position of each tower is, for inputs that are raw or prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from mm_adapters._errors import InputError
from mm_adapters._sitemap import MountedTower, SiteMap
from mm_adapters._tokens import TokenLayout, cut_layout, language_layout, text_layout, vision_layout


def patch_layout(
    tower: MountedTower, pixels: Float[Tensor, "image ..."], grids: Int[Tensor, "image 2"] | None = None
) -> TokenLayout:
    """The layout of a vision tower's sequence for these pixels.

    `grids` are each image's rows and columns of patches, where images come cut into patches and
    padded to the same number.

    Raises: InputError if the tower does not cut images into patches, or wants grids.
    """
    record = tower.record
    if record.grids is not None:
        if grids is None:
            raise InputError(f"The {tower.name} tower takes images cut into patches. Pass {record.grids}=.")
        return cut_layout([(int(r), int(c)) for r, c in grids], pixels.shape[1])
    if tower.record.patch is None:
        raise InputError(f"The {tower.name} tower has no patches.")
    cut: Any = tower.module.get_submodule(tower.record.patch)
    down, across = cut.stride
    grid = (pixels.shape[-2] // down, pixels.shape[-1] // across)
    return vision_layout(len(pixels), grid, _count(record.n_class), _count(record.n_register))


def _count(number: object) -> int:
    assert isinstance(number, int), "A mounted tower's record is settled."
    return number


def layouts(
    model: Any, sites: SiteMap, tokenizer_of: Any, prepared: Mapping[str, Any], texts: Sequence[str] | None
) -> dict[str, TokenLayout]:
    """The layout of every tower whose inputs are among `prepared`, the wrapped model's arguments.

    `texts` are what the tokens were made of, where that is known; they are decoded otherwise.
    """
    found: dict[str, TokenLayout] = {}
    ids, mask = None, prepared.get("attention_mask")
    for name, tower in sites.towers.items():
        given = prepared.get(tower.mount.takes or tower.record.takes)
        if given is None:
            continue
        if tower.record.role == "vision":
            found[name] = patch_layout(tower, given, prepared.get(tower.record.grids or ""))
        elif tower.record.role in ("text", "language"):
            ids, tokenizer = given, tokenizer_of(name)
            if tokenizer is None:
                raise InputError(
                    f"The {name} tower has no tokenizer, so its tokens have no words. "
                    "Pass one: mm_adapters.wrap(model, tokenizer=...)."
                )
            field = sites.mounts.image_token
            if field is None or "vision" not in found:
                found[name] = text_layout(texts, tokenizer, ids, mask)
            else:
                image_id = getattr(model.config, field)
                found[name] = _with_images(found["vision"], texts, tokenizer, ids, mask, image_id)
    return found


def _with_images(
    vision: TokenLayout, texts: Sequence[str] | None, tokenizer: Any, ids: Tensor, mask: Any, image_id: int
) -> TokenLayout:
    assert vision.grid is not None
    rows, cols = vision.grid
    places = int((ids == image_id).sum()) // vision.n_rows
    # A model that hands on its class token gives each image a place more than it has patches.
    return language_layout(texts, tokenizer, ids, mask, image_id, vision.grid, places - rows * cols)
