"""What a run's arguments tell beforehand: how many rows, positions and steps there will be.

What they do not tell is checked when the values pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mm_adapters._errors import InputError, MissingSiteError, ModelStateError
from mm_adapters.inputs.cache_argument import cache_of
from mm_adapters.inputs.pipeline_call import n_pictures
from mm_adapters.records.resolve import is_guided_by, may_perturb
from mm_adapters.records.spec import Site
from mm_adapters.runs.base_model import BaseModel
from mm_adapters.runs.indices import rows_among, within
from mm_adapters.runs.lens import Edit, Read


def check_foreseen(
    model: BaseModel,
    arguments: Mapping[str, Any],
    asked: Sequence[Read | Edit],
    *,
    generating: bool = False,
) -> None:
    """Passes if rows, positions and steps can be there, as far as the arguments tell.

    Raises: InputError naming those that cannot; ModelStateError where a module takes one row at a time.
    """
    for item in asked:
        site = model.sitemap[item.site]
        if item.rows != "all" and vars(model.sitemap.towers[site.tower].module).get("use_slicing"):
            raise ModelStateError(
                f"{item.site}: slicing is on, so each call holds one row, and none are apart. Switch it "
                f"off ({site.tower}.disable_slicing()), or read all rows."
            )
        if not isinstance(item.rows, str) and (n := n_rows(model, site, arguments)) is not None and n > 0:
            rows_among(item.site, item.rows if isinstance(item.rows, slice) else tuple(item.rows), n)
        if item.steps is not None and not generating:
            n = n_steps(model, site, arguments)
            missing = [step for step in item.steps if n is not None and step >= n]
            if missing:
                took = "one step" if n == 1 else f"{n} steps"
                raise InputError(
                    f"{item.site}: there is no step {', '.join(map(str, missing[:8]))}, for this run takes "
                    f"{took}, counted from 0."
                )
        if isinstance(item, Edit) and item.positions is not None and not generating:
            n = n_positions(model, site, arguments, max(item.positions), min(item.positions))
            if n is not None:
                within(item.site, tuple(item.positions), n, "position")


def n_rows(model: BaseModel, site: Site, arguments: Mapping[str, Any]) -> int | None:
    """How many rows a site's values will have; None if the arguments do not tell."""
    tower = model.sitemap.towers[site.tower]
    if model.sitemap.model_record.loop is None:
        given = arguments.get(tower.input_name)
        record = tower.record
        plain = record.role in ("text", "language") or (record.order == "lines" and not record.packed)
        usual = {"text": 2, "language": 2, "vision": 4}.get(record.role)
        return len(given) if plain and isinstance(given, Tensor) and given.ndim == usual else None
    n = n_pictures(arguments)
    if n is None or site.tower not in model.sitemap.loops:
        return None
    guidance = model.sitemap.loops[site.tower]
    if guidance is None or guidance.denoiser_calls:
        return n
    unguided = is_guided_by(model.wrapped, guidance, arguments) is False
    n_parts = 1 if unguided else len(guidance.denoiser_rows)
    return n * (n_parts + may_perturb(model.wrapped, guidance))


def n_steps(model: BaseModel, site: Site, arguments: Mapping[str, Any]) -> int | None:
    """How many steps a site's tower will take at most; None if the arguments do not tell."""
    record = model.sitemap.model_record
    if record.loop is None:
        # A language model may call its vision tower for pictures and for videos.
        many = model.kind == "vlm" and model.sitemap.towers[site.tower].record.role not in (
            "text",
            "language",
        )
        return None if many else 1
    if site.tower not in model.sitemap.loops:
        return None
    sampling = record.sampling_of(site.tower)
    if sampling is None:
        return None
    for name in ("timesteps", "sigmas"):
        if isinstance(arguments.get(name), Sequence):
            return len(arguments[name])
    taken = inspect.signature(type(model.wrapped).__call__).parameters
    n = arguments.get(sampling.steps, taken[sampling.steps].default if sampling.steps in taken else None)
    return n if isinstance(n, int) else None


def n_positions(
    model: BaseModel, site: Site, arguments: Mapping[str, Any], highest: int, lowest: int
) -> int | None:
    """How many positions a site of a text, language or vision tower will have; None if nothing tells, or if
    positions from `lowest` to `highest` are there in any case."""
    if "pos" not in site.axes or model.sitemap.model_record.loop is not None:
        return None
    tower = model.sitemap.towers[site.tower]
    given = arguments.get(tower.input_name)
    if not isinstance(given, Tensor) or cache_of(arguments) is not None:
        return None
    if tower.record.role in ("text", "language"):
        # Where pictures' places are written into the text it grows by them, and never shrinks.
        if highest < given.shape[-1] and lowest >= -given.shape[-1]:
            return None
        if model.kind != "vlm":
            return given.shape[-1]
    try:
        own = tower.record.role == "vision" and model.kind != "vlm"
        fed = {tower.input_name: given} if own else arguments
        layout = model.layout(**{k: v for k, v in fed.items() if isinstance(v, Tensor)})
        return layout.at(site.name).n_pos
    except (InputError, MissingSiteError, KeyError):
        return None
