"""What methods ask of a model and its towers, whichever engine runs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mm_adapters import InputError, MissingSiteError, Model, TowerView


def model_summary(tower: TowerView, output: Any) -> Float[Tensor, "row width"]:
    """The model's own embedding, from what the tower's run gave; in float32, without its graph."""
    return tower.summary(output).detach().float()


def check_one(images: Any, texts: Any) -> str:
    """Which tower is meant. Raises: InputError unless exactly one side is given."""
    if (images is None) == (texts is None):
        raise InputError("Give images or texts, one of the two.")
    return "vision" if texts is None else "text"


def check_sites(model: Model, names: Iterable[str]) -> None:
    """Raises: MissingSiteError for a site that the model lacks; first one with a reason."""
    present = {site.name for site in model.sites() if site.reason is None}
    missing = [name for name in names if name not in present]
    absent = [site.name for site in model.sites() if site.reason is not None]
    missing.sort(key=lambda name: not any(fnmatchcase(name, pattern) for pattern in absent))
    if missing:
        model.check_site(missing[0])


def prepared_once(model: Model, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own arguments, so that many runs of raw texts and images do not each prepare them again."""
    raw = {name: inputs[name] for name in ("text", "images") if inputs.get(name) is not None}
    if not raw or isinstance(raw.get("text"), Tensor):  # open_clip's argument of tokens has this name.
        return dict(inputs)
    return {**model.prepare(**raw), **{k: v for k, v in inputs.items() if k not in ("text", "images")}}


def check_pool(tower: TowerView, *pools: str) -> None:
    """Raises: MissingSiteError unless the tower's summary is read from the sequence in one of these ways."""
    if tower.pool not in pools:
        raise MissingSiteError(
            f"{tower.name}: its summary is pooled by {tower.pool}, which is not split here: what is split is "
            f"{' or '.join(_POOLS[pool] for pool in pools)}."
        )


def check_whole_images(tower: TowerView) -> None:
    """Raises: MissingSiteError for a tower whose images are cut into patches before it gets them."""
    if tower.record.grids is not None:
        raise MissingSiteError(
            f"{tower.name}: it takes images cut into patches that are packed into positions, so there are no "
            "pixels to show or to change."
        )


def check_summary(model: Model, tower: TowerView) -> None:
    """Raises: MissingSiteError if the model's output holds no summary of the tower that parts add up to."""
    if model.kind == "diffusion":
        raise MissingSiteError(
            f"{model.name}: its output holds no summary of the {tower.name} tower, because it is a pipeline. "
            "Load that tower by itself."
        )
    if tower.mount.unit:
        raise MissingSiteError(
            f"{model.name}: what runs the {tower.name} tower divides its summary by its length, so it is no "
            "sum of what parts of the tower add."
        )


_POOLS = {
    "first": "the first position's",
    "last": "the last position's",
    "end": "the end token's",
    "attention": "what attention pools",
}
