"""What methods ask of a model, whichever engine runs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from mm_adapters import InputError, Run
from mm_adapters.sites.single_tower import pooled_output
from mm_adapters.sites.site_map import SiteMap
from mm_adapters.sites.tower_view import TowerView


@runtime_checkable
class Model(Protocol):
    """A Lens that knows its own sites and prepares raw inputs: HookedModel and TracedModel."""

    sitemap: SiteMap

    @property
    def wrapped(self) -> Any: ...

    def prepare(self, *, text: Any = None, images: Any = None) -> dict[str, Any]: ...

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        read: Iterable[Any] = (),
        edit: Iterable[Any] = (),
        grad_of: Any = None,
    ) -> Run: ...


def model_summary(tower: TowerView, output: Any) -> Float[Tensor, "row width"]:
    """The model's own embedding, from what the tower's run gave."""
    found = pooled_output(tower, output)
    found = found[:, 0] if found.ndim == 3 and tower.record.pool == "first" else found
    return found.detach().float()


def input_name(tower: TowerView) -> str:
    """The argument the tower is run with."""
    return tower.mount.takes or tower.record.takes


def check_one(images: Any, texts: Any) -> str:
    """Which tower is meant. Raises: InputError unless exactly one side is given."""
    if (images is None) == (texts is None):
        raise InputError("Give images or texts, one of the two.")
    return "vision" if texts is None else "text"
