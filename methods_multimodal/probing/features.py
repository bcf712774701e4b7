"""What probes are trained on: one vector for each input, site, role and sampling step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.model import check_sites
from methods_multimodal.probing.roles import MEAN, pooling
from mm_adapters import InputError, Model, Read
from mm_adapters.store import Column, Store, Writer, of_tensors, provenance

Batches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Place:
    """Where a probe reads; `step` is a sampling step, None outside sampling loops."""

    site: str
    role: str
    step: int | None = None

    @property
    def column(self) -> str:
        """Its name in a store."""
        return f"{self.site}@{self.role}" + ("" if self.step is None else f"@{self.step}")

    @classmethod
    def of_column(cls, name: str) -> Place:
        """The place of a store's column. Raises: InputError for a name that is none."""
        site, *rest = name.split("@")
        if len(rest) not in (1, 2) or not all(part.isdecimal() for part in rest[1:]):
            raise InputError(f"The column {name!r} is no place: it is called SITE@ROLE, or SITE@ROLE@STEP.")
        return cls(site, rest[0], int(rest[1]) if rest[1:] else None)


class Features:
    """The rows of every place, in memory or in a store, read place by place."""

    def __init__(self, rows: Mapping[str, Float[Tensor, "row width"]] | Store) -> None:
        names = rows.columns if isinstance(rows, Store) else rows
        self._rows = rows
        self.places = tuple(Place.of_column(name) for name in names)
        self.n_rows = len(rows) if isinstance(rows, Store) else len(next(iter(rows.values())))

    @property
    def fingerprint(self) -> str:
        """What the rows are, by their content."""
        if isinstance(self._rows, Store):
            return self._rows.content
        return of_tensors(dict(self._rows))

    def n_bytes(self, place: Place) -> int:
        """How much memory one place's rows take. Raises: InputError if they are not there."""
        self._check(place)
        if isinstance(self._rows, Store):
            return self._rows.columns[place.column].row_bytes * self.n_rows
        return self._rows[place.column].nbytes

    def parts(self, place: Place, size: int = 4096) -> Iterator[Float[Tensor, "row width"]]:
        """One place's rows in order, at most `size` at a time. Raises: InputError if they are not there."""
        self._check(place)
        for start in range(0, self.n_rows, size):
            if isinstance(self._rows, Store):
                yield self._rows.rows(start, start + size, [place.column])[place.column]
            else:
                yield self._rows[place.column][start : start + size]

    def at(self, place: Place) -> Float[Tensor, "row width"]:
        """One place's rows. Raises: InputError if they are not there."""
        self._check(place)
        if isinstance(self._rows, Store):
            return self._rows.rows(columns=[place.column])[place.column]
        return self._rows[place.column]

    def _check(self, place: Place) -> None:
        if place not in self.places:
            known = ", ".join(one.column for one in self.places[:4])
            raise InputError(f"There are no rows of {place.column}; there are those of {known}, ...")


def expand_sites(model: Model, sites: str | Sequence[str]) -> tuple[str, ...]:
    """The names of sites: as listed, or all that match a glob, in the order they run.

    Raises: MissingSiteError if there is none, or one that is listed is missing.
    """
    if not isinstance(sites, str):
        check_sites(model, sites)
        return tuple(sites)
    names = tuple(site.name for site in model.sites(sites) if site.reason is None)
    if not names:
        model.check_site(sites.replace("*", "0"))
    return names


def read_features(
    model: Model,
    batches: Batches,
    *,
    sites: str | Sequence[str],
    roles: Sequence[str] = (MEAN,),
    steps: Sequence[int] | None = None,
    folder: str | Path | None = None,
) -> Features:
    """Runs the inputs once and keeps, of every site, the mean over each role's positions.

    Of a pipeline's guided calls it is the conditional half; of a step with several calls, the first.

    Args:
        batches: The inputs of `model.run`, a picture, text or prompt a row.
        sites: A glob ("vision.blocks.*.hook_resid_post"), or names.
        roles: "mean", "last" (neither counts padding), and roles of the token layout ("class", "patch").
        steps: Of sites in a sampling loop, which steps (None: all).
        folder: Where rows are written down as they are made (None: they stay in memory); a call that was
            killed goes on there.

    Raises: MissingSiteError for a site or role that is not there; InputError for steps of sites without any,
        rows without a role; StoreError for a folder of other work.
    """
    names, roles = expand_sites(model, sites), tuple(roles)
    batches = [dict(batch) for batch in batches]
    if not batches or not roles:
        raise InputError(
            f"A probe needs inputs and roles; there are {len(batches)} batches, {len(roles)} roles."
        )
    looped = {model.check_site(name).tower in model.loops() for name in names}
    if len(looped) > 1 or (steps is not None and looped == {False}):
        raise InputError(
            "Steps are of a sampling loop: give sites that are all within it, or none and leave `steps` out."
        )
    for name in names:
        pooling(model, batches[0], name, roles)
    steps = None if steps is None else tuple(steps)
    if folder is None:
        parts: dict[str, list[Tensor]] = defaultdict(list)
        for batch in tqdm(batches, desc="reading", unit="batch", disable=None, leave=False):
            for column, rows in _rows_of(model, batch, names, roles, steps).items():
                parts[column].append(rows.cpu())
        return Features({column: torch.cat(rows) for column, rows in parts.items()})
    made_of = provenance(
        models={"model": model}, data=batches, sites=names, job="read_features", roles=roles, steps=steps
    )
    return Features(
        _stored(Path(folder), made_of, batches, lambda b: _rows_of(model, b, names, roles, steps))
    )


def _rows_of(
    model: Model,
    inputs: Mapping[str, Any],
    sites: Sequence[str],
    roles: Sequence[str],
    steps: Sequence[int] | None,
) -> dict[str, Float[Tensor, "row width"]]:
    guided = model.kind == "diffusion"
    loops = model.loops()
    reads = []
    for site in sites:
        one: dict[str, Any] = {"rows": "cond"} if guided else {}
        if model.check_site(site).tower in loops:
            one |= {"steps": steps, "calls": [0]}
        reads.append(Read(site, reduce=pooling(model, inputs, site, roles), **one))
    run = model.run(inputs, read=reads)
    rows = {}
    for site in sites:
        values = run[site]
        numbers: list[int | None] = [None]
        if model.check_site(site).tower in loops:
            numbers = [call.step for call in run.calls[site]]
        else:
            values = values[None]
        for value, step in zip(values, numbers, strict=True):
            rows |= {Place(site, role, step).column: value[:, i] for i, role in enumerate(roles)}
    return rows


def _stored(folder: Path, made_of: Mapping[str, Any], batches: Batches, rows_of: Any) -> Store:
    first, columns = None, _columns_of(folder)
    if columns is None:
        first = rows_of(batches[0])
        columns = {name: Column(tuple(rows.shape[1:]), torch.float32) for name, rows in first.items()}
    with Writer(folder, columns, made_of) as writer:
        begun = len(batches) if writer.complete else writer.appends
        todo = range(begun, len(batches))
        for number in tqdm(
            todo, initial=begun, total=len(batches), desc="reading", disable=None, leave=False
        ):
            rows = first if first is not None and number == 0 else rows_of(batches[number])
            writer.append(rows)
    return Store(folder)


def _columns_of(folder: Path) -> dict[str, Column] | None:
    """The columns of a store that was begun; None if there is none."""
    return Store(folder, partial=True).columns if (folder / "manifest.json").is_file() else None
