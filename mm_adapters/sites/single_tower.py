"""What runs when only one tower's inputs are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mm_adapters.sites.site_map import SiteMap
from mm_adapters.sites.tower_view import TowerView


def single_tower(sites: SiteMap, arguments: Mapping[str, Any]) -> TowerView | None:
    """The one tower of a composite model that these arguments are for; None if that is not so."""
    if sites.model_record.kind not in ("contrastive", "vlm"):
        return None
    named = {name: tower.input_name for name, tower in sites.towers.items()}
    fed = [name for name, argument in named.items() if arguments.get(argument) is not None]
    return sites.towers[fed[0]] if len(fed) == 1 else None


def callable_for(model: Any, sites: SiteMap, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """What to call with these arguments: the model, or one tower as the model runs it."""
    tower = single_tower(sites, arguments)
    if tower is None:
        return model
    return tower.runner_in(model)
