"""What pyvene is asked for: which kind of intervention at which site, and at which positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyvene as pv
from pyvene.models import intervenable_modelcard as card

from integrations.pyvene._pipeline import host
from integrations.pyvene.interventions import BoundlessPositions
from integrations.pyvene.registration import component_of, register, width_of
from mm_adapters import InputError
from mm_adapters.sites.site_map import SiteMap


def intervention(
    model: Any,
    site: str,
    kind: type[pv.Intervention] | Any,
    *,
    unit: str = "pos",
    max_number_of_units: int = 1,
    **options: Any,
) -> Any:
    """A representation config: this kind of intervention at this site.

    Several units (patches, heads) share one subspace (`keep_last_dim`): pyvene's own default lays
    them side by side, so that a subspace of 17 patches would have 17 times the width.

    Raises: MissingSiteError for an unknown site; InputError for one that pyvene cannot reach.
    """
    wrapped = getattr(model, "wrapped", model)
    sites = SiteMap(wrapped)
    found = sites[site]
    missing = register(model)
    table = card.type_to_module_mapping[type(host(model))]
    name = component_of(found)
    if name in missing:
        raise InputError(f"{site}: {missing[name]}. Reach it with model.run(edit=...).")
    name = site if site in table else name
    width = width_of(sites, found, wrapped)
    if found.location is not None and getattr(found.location, "heads", None) and unit in ("h", "h.pos"):
        width = int(card.type_to_dimension_mapping[type(host(model))][name][0])
    if width is None:
        raise InputError(f"{site}: its width is not known before it runs; use a site of a block.")
    made = kind
    kind = BoundlessPositions if kind is pv.BoundlessRotatedSpaceIntervention else kind
    if isinstance(kind, type):
        made = kind(embed_dim=width, keep_last_dim=True, **options)
        made.keep_last_dim = True
    return pv.RepresentationConfig(
        layer=found.layer or 0,
        component=name,
        unit=unit,
        max_number_of_units=max_number_of_units,
        intervention=made,
    )


def units(positions: Sequence[int], n_rows: int, sources: Sequence[int] | None = None) -> dict[str, Any]:
    """`unit_locations` for these positions of every row, read at `sources` (None: the same positions).

    pyvene's shorthand takes a list of two positions for a source's and a base's.
    """
    into, out = list(positions), list(positions if sources is None else sources)
    return {"sources->base": ([[out] * n_rows], [[into] * n_rows])}
