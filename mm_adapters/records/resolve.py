"""A record, read against one module: which of its paths are there, and what depends on how it was built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from mm_adapters.records.spec import (
    Attention,
    Built,
    Guidance,
    Input,
    Location,
    Norm,
    Output,
    Parts,
    Residual,
    Tower,
)


def resolve_record(record: Tower, module: nn.Module) -> Tower:
    """The record of a tower as this module was built: no alternatives, nothing that is not there."""
    return replace(
        record,
        pool=_value(record.pool, module),
        n_class=_number(record.n_class, module),
        n_register=_number(record.n_register, module),
        embed=_first(record.embed, lambda p: _tensor(module, p)),
        position=_first(record.position, lambda p: _tensor(module, p)),
        patch=_first(record.patch, lambda p: has(module, p)),
    )


def resolve_parts(parts: Parts, owner: nn.Module) -> dict[str, Location]:
    """The parts that `owner` has, each at the first of its paths that is there."""
    present = {
        name: placed for name, location in parts.items() if (placed := _located(location, owner)) is not None
    }
    for name, location in list(present.items()):
        if isinstance(location, Residual) and not {location.base, location.branch} <= present.keys():
            del present[name]
    return present


def has(owner: nn.Module, path: str) -> bool:
    """Whether a module stands at a path. Optional ones are stored as None."""
    try:
        owner.get_submodule(path)
    except AttributeError:
        return False
    return True


def first_path(owner: nn.Module, paths: str) -> str | None:
    """The first of several paths at which a module stands."""
    return _first(paths, lambda p: has(owner, p))


def head_count(owner: nn.Module, where: str) -> int:
    """The number at "module:attribute", seen from `owner`."""
    for one in where.split("|"):
        path, _, attribute = one.partition(":")
        try:
            return int(attrgetter(attribute)(owner.get_submodule(path)))
        except AttributeError:
            continue
    raise AttributeError(
        f"{type(owner).__name__} has no {where}, which its family says is a number of heads."
    )


def is_guided(model: Any, guidance: Guidance, arguments: Mapping[str, Any]) -> bool:
    """Whether a pipeline's run with these arguments has unconditional parts; where the pipeline itself
    says so, it says it while it runs."""
    if guidance.flag is not None:
        return bool(getattr(model, guidance.flag))
    taken = inspect.signature(type(model).__call__).parameters
    scales = [scale for scale in guidance.scale.split("|") if scale in taken]  # Without one it never guides.
    return any(arguments.get(scale, taken[scale].default) > 1 for scale in scales)


def is_guided_by(model: Any, guidance: Guidance, arguments: Mapping[str, Any]) -> bool | None:
    """Whether a pipeline will be guided, by its arguments alone; None if they do not tell."""
    try:
        return is_guided(model, replace(guidance, flag=None), arguments)
    except (TypeError, RuntimeError):  # A scale for each row, or none.
        return None


def may_perturb(model: Any, guidance: Guidance) -> bool:
    """Whether a pipeline has a guidance by perturbed attention, on or off."""
    return guidance.perturbed is not None and hasattr(type(model), guidance.perturbed)


def _located(location: Location | tuple[Location, ...] | Built, owner: nn.Module) -> Location | None:
    chosen: Any = _value(location, owner)
    if isinstance(chosen, tuple):
        return next((present for one in chosen if (present := _located(one, owner)) is not None), None)
    if isinstance(chosen, Residual):
        return chosen
    path = first_path(owner, chosen.path)
    needs = chosen.needs if isinstance(chosen, Output | Input | Attention) else None
    if path is None or (needs and first_path(owner, needs) is None):
        return None
    if isinstance(chosen, Norm) and isinstance(owner.get_submodule(path), nn.Identity):
        return None  # A norm that was left out.
    return chosen if path == chosen.path else replace(chosen, path=path)


def _first(paths: str | None, there: Any) -> str | None:
    return None if paths is None else next((p for p in paths.split("|") if there(p)), None)


def _tensor(module: nn.Module, path: str) -> bool:
    try:
        return isinstance(attrgetter(path)(module), Tensor)
    except AttributeError:
        return False


def _value(value: Any, module: nn.Module) -> Any:
    if not isinstance(value, Built):
        return value
    for attribute, expected, then in value.cases:
        try:
            actual = attrgetter(attribute)(module)
        except AttributeError:
            continue
        if (
            (actual is not None and actual is not False) == expected
            if isinstance(expected, bool)
            else actual == expected
        ):
            return then
    return value.otherwise


def _number(value: Any, module: nn.Module) -> int:
    value = _value(value, module)
    return int(attrgetter(value)(module)) if isinstance(value, str) else value
