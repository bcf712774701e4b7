"""What runs when only one tower's inputs are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mm_adapters.sites.site_map import SiteMap, TowerView, resolve


def single_tower(sites: SiteMap, given: Mapping[str, Any]) -> TowerView | None:
    """The one tower of a composite model that these arguments are for; None if that is not so."""
    if sites.model_record.kind not in ("contrastive", "vlm"):
        return None
    named = {name: tower.mount.takes or tower.record.takes for name, tower in sites.towers.items()}
    wanted = [name for name, argument in named.items() if given.get(argument) is not None]
    return sites.towers[wanted[0]] if len(wanted) == 1 else None


def callable_for(model: Any, sites: SiteMap, given: Mapping[str, Any]) -> Callable[..., Any]:
    """What to call with these arguments: the model, or one tower as the model runs it."""
    tower = single_tower(sites, given)
    if tower is None:
        return model
    return tower.module if tower.mount.run is None else resolve(model, tower.mount.run)


def pooled_output(tower: TowerView, output: Any) -> Any:
    """The tensor that sums a tower up, out of what its run gives."""
    gives = tower.record.gives if tower.mount.gives is None else tower.mount.gives
    for name in gives.split(".") if gives else ():
        output = getattr(output, name)
    return output
