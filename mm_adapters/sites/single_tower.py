"""What runs when only one tower's inputs are given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from mm_adapters.sites.site_map import SiteMap, resolve
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
    if tower.mount.run is None:
        return tower.module
    run = resolve(model, tower.mount.run)
    # The model's forward and what runs one tower may call the same argument differently (CoCa's do).
    first = next(iter(inspect.signature(run).parameters))
    if tower.mount.run == "" or first == tower.input_name:
        return run
    return lambda **given: run(
        **{first if name == tower.input_name else name: v for name, v in given.items()}
    )
