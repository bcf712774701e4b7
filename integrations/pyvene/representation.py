"""What pyvene is asked for: which kind of intervention at which site, and at which positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyvene as pv
from pyvene.models import intervenable_modelcard as card
from torch import Tensor

from integrations.pyvene._pipeline import ModelLike, host
from integrations.pyvene.interventions import BoundlessPositions
from integrations.pyvene.options import check_options
from integrations.pyvene.registration import component_of, register, width_of
from mm_adapters import InputError, SiteMap

_HEAD_UNITS = ("h", "h.pos")
_UNITS = ("pos", *_HEAD_UNITS)


def intervention(
    model: ModelLike,
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

    Args:
        model: An `mm.Model`, or the module or pipeline that it wraps.
        site: A site's name.
        kind: A class of pyvene's or of this package's, or an intervention that is made already.
        unit: "pos" for positions; "h" for heads and "h.pos" for positions of heads, at sites with heads.
        max_number_of_units: How many units one call intervenes on at most.
        options: Of the class.

    Raises: MissingSiteError for an unknown site; InputError for one that pyvene cannot reach, and for a
    unit or an option that would be ignored.
    """
    wrapped = getattr(model, "wrapped", model)
    where = SiteMap(wrapped).check(site)
    if unit not in _UNITS or (unit in _HEAD_UNITS and where.n_heads is None):
        raise InputError(f"unit={unit!r}: {site} has {', '.join(_UNITS if where.n_heads else _UNITS[:1])}.")
    if max_number_of_units < 1:
        raise InputError(f"max_number_of_units={max_number_of_units}: at least one.")
    missing = register(model)
    table = card.type_to_module_mapping[type(host(model))]
    name = component_of(where)
    if name in missing:
        raise InputError(f"{site}: {missing[name]}. Reach it with model.run(edit=...).")
    name = site if site in table else name
    width = width_of(where, wrapped)
    if unit in _HEAD_UNITS:
        width = int(card.type_to_dimension_mapping[type(host(model))][name][0])
    if width is None:
        raise InputError(f"{site}: its width is not known before it runs; use a site of a block.")
    one = kind
    kind = BoundlessPositions if kind is pv.BoundlessRotatedSpaceIntervention else kind
    if isinstance(kind, type):
        check_options(kind, options)
        fixed = sorted({"embed_dim", "keep_last_dim"} & options.keys())
        if fixed:
            raise InputError(f"{fixed[0]} is set by the site: {site} has embed_dim={width}.")
        one = kind(embed_dim=width, keep_last_dim=True, **options)
        one.keep_last_dim = True
    elif options:
        raise InputError(f"{next(iter(options))}=: this {type(one).__name__} is made already; pass a class.")
    return pv.RepresentationConfig(
        layer=where.layer or 0,
        component=name,
        unit=unit,
        max_number_of_units=max_number_of_units,
        intervention=one,
    )


def units(
    positions: Sequence[int] | Tensor,
    n_rows: int | None = None,
    sources: Sequence[int] | Tensor | None = None,
) -> dict[str, Any]:
    """`unit_locations` for these positions, read at `sources` (None: the same positions).

    A list is the positions of every one of `n_rows` rows. A tensor, [row] or [row, unit], has each row's:
    `units(model.row_positions(base), sources=model.row_positions(source))` are the last tokens of rows.
    pyvene's shorthand takes a list of two positions for a source's and a base's.

    Raises: InputError for a negative position, or another number of them in the source.
    """
    base = _rows_of(positions, n_rows)
    source = base if sources is None else _rows_of(sources, len(base))
    if len(base[0]) != len(source[0]):
        raise InputError(
            f"{len(base[0])} positions are read at {len(source[0])} of the source; give as many."
        )
    return {"sources->base": ([source], [base])}


def _rows_of(positions: Sequence[int] | Tensor, n_rows: int | None) -> list[list[int]]:
    if isinstance(positions, Tensor):
        rows = positions.reshape(len(positions), -1).tolist() if positions.ndim else []
        if n_rows not in (None, len(rows)):
            raise InputError(f"{len(rows)} rows of positions for {n_rows} rows.")
    else:
        rows = [list(positions)] * (n_rows or 0)
    if not rows or not rows[0] or min(position for row in rows for position in row) < 0:
        raise InputError(
            f"Positions count from 0, at least one in at least one row; not {positions} in {n_rows} rows."
        )
    return rows
