"""One probe for every variable at every layer, role and step, each beside its nulls."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.kept import kept
from methods_multimodal.core.running import State, run_steps
from methods_multimodal.core.shuffled_weights import shuffled_copy
from methods_multimodal.probing.classifiers import STRENGTHS, Head, check_head
from methods_multimodal.probing.features import Batches, Features, Place, expand_sites, read_features
from methods_multimodal.probing.labels import Column, Labels, Split, check_split, split_rows
from methods_multimodal.probing.roles import MEAN
from methods_multimodal.probing.sheet import KINDS, Kind, ProbeSheet
from methods_multimodal.probing.streamed import PlaceRows
from mm_adapters import InputError, Model

Values = Mapping[str, Column]


def probe(
    model: Model,
    batches: Batches,
    labels: Values,
    *,
    sites: str | Sequence[str],
    roles: Sequence[str] = (MEAN,),
    steps: Sequence[int] | None = None,
    types: Sequence[Hashable] | None = None,
    twin: Model | Literal["shuffled"] | None = "shuffled",
    split: Split | None = None,
    head: Head = "linear",
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    folder: str | Path | None = None,
) -> ProbeSheet:
    """Which variables can be read off which sites, roles and steps: one run of the inputs, then the probes.

    Args:
        batches: The inputs of `model.run`, a picture, text or prompt a row.
        labels: Each variable's values, one for each row of all batches.
        sites: A glob ("vision.blocks.*.hook_resid_post") or names: the layers of the sheet.
        roles: Whose mean is probed: "mean" and "last" (neither counts padding), "class", "patch", "word", ...
        steps: Of sites in a sampling loop, which steps (None: all).
        types: What each row is of, for the control task: the same things must come up in training and test
            rows, as the kind of object that pictures show (None: no control task).
        twin: The baseline model: untrained, say; "shuffled" is a copy with all weights in random places.
        split: Which rows train, choose and judge (None: 60, 20 and 20 % at random).
        head: "linear" (logistic regression) or "mlp" (one hidden layer of 64).
        strengths: Inverse penalties among which the validation rows choose, for each probe.
        seed: Of the split, the controls' labels, the twin's weights and an MLP's beginning.
        folder: Where rows and results are written down as they are made, so that a call that was killed goes
            on there.

    Source: Alain and Bengio 2016, arXiv 1610.01644; Hewitt and Liang 2019, arXiv 1909.03368.
    Raises: MissingSiteError, InputError as `read_features`; InputError for labels that do not fit the rows;
        StoreError for a folder of other work.
    """
    check_head(head, strengths)
    names = expand_sites(model, sites)
    n = check_labels(labels, types)
    expected = [_n_rows(model, batch, names[0]) for batch in batches]
    if None not in expected and sum(filter(None, expected)) != n:
        raise InputError(f"There are {n} labels for {sum(filter(None, expected))} rows of inputs.")
    split = split_rows(n, seed) if split is None else split
    check_split(split, n)
    for name, values in labels.items():
        Labels.of(name, values, split)
    baseline = shuffled_copy(model, model.towers, seed) if twin == "shuffled" else twin
    options: dict[str, Any] = {"sites": names, "roles": roles, "steps": steps}
    models: dict[str, Model] = {"model": model} | ({} if baseline is None else {"twin": baseline})
    plain = _plain(labels, types, split, head, strengths, seed)
    with kept(
        folder, job="probe", models=models, data=[dict(b) for b in batches], **options, **plain
    ) as work:
        rows = {
            name: read_features(one, batches, folder=work.inside(name), **options)
            for name, one in models.items()
        }
        return probe_features(
            rows["model"],
            labels,
            types=types,
            twin=rows.get("twin"),
            split=split,
            head=head,
            strengths=strengths,
            seed=seed,
            folder=work.inside("probes"),
            name=model.name,
        )


def probe_features(
    rows: Features,
    labels: Values,
    *,
    types: Sequence[Hashable] | None = None,
    twin: Features | None = None,
    split: Split | None = None,
    head: Head = "linear",
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    folder: str | Path | None = None,
    name: str = "",
) -> ProbeSheet:
    """The same of rows that were read before, of a store's say; `name` is their model's. The rest as `probe`.

    Rows are in memory one place at a time, and a part at a time if a place has more than a gigabyte. The
    shuffled and the control task are learned by a probe of the strength that was chosen for the task.

    Raises: InputError if the places are no table of sites, roles and steps, or labels do not fit the rows.
    """
    n = check_labels(labels, types)
    if n != rows.n_rows or (twin is not None and (twin.n_rows != n or set(twin.places) != set(rows.places))):
        raise InputError(f"There are {n} labels for {rows.n_rows} rows; a twin has the same rows and places.")
    split = split_rows(n, seed) if split is None else split
    check_split(split, n)
    sites = tuple(dict.fromkeys(place.site for place in rows.places))
    roles = tuple(dict.fromkeys(place.role for place in rows.places))
    steps = tuple(dict.fromkeys(place.step for place in rows.places))
    places = [Place(site, role, step) for site in sites for role in roles for step in steps]
    if set(places) != set(rows.places):
        raise InputError("The places are no table: every site needs every role and step.")
    variables = [Labels.of(name, values, split) for name, values in labels.items()]
    missing: set[Kind] = set()
    missing |= {"control"} if types is None else set()
    missing |= {"twin"} if twin is None else set()
    kinds: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind not in missing)
    fitting = {"head": head, "seed": seed, "train": split.train}

    def one_place(state: State, number: int) -> State:
        """All probes of one place."""
        here = {"task": PlaceRows(rows, places[number])}
        if twin is not None:
            here["twin"] = PlaceRows(twin, places[number])
        out = {key: value.clone() for key, value in state.items()}
        for v, variable in enumerate(variables):
            strength = 0.0
            for k, kind in enumerate(kinds):
                ids = _ids(variable, kind, types, seed)
                chosen: dict[str, Any] = {"validation": split.validation, "strengths": strengths}
                if kind in ("shuffled", "control"):
                    chosen = {"strengths": [strength], "validation": None}
                x = here.get(kind, here["task"])
                fitted = x.fit(ids, n_classes=len(variable.classes), **fitting, **chosen)
                if kind == "task":
                    strength = fitted.strength
                    out["strength"][v, number] = strength
                if kind in ("task", "twin"):
                    out["validation"][k, v, number] = fitted.validation
                right = x.predict(fitted, split.test).numpy() == ids[split.test.numpy()]
                out["right"][k, v, number] = torch.from_numpy(right)
        bar.update()
        return out

    shape = (len(kinds), len(variables), len(places))
    start = {
        "right": torch.zeros(*shape, len(split.test), dtype=torch.bool),
        "validation": torch.zeros(shape, dtype=torch.float64),
        "strength": torch.zeros(shape[1:], dtype=torch.float64),
    }
    plain = _plain(labels, types, split, head, strengths, seed)
    data = None if folder is None else {"rows": rows.fingerprint, "twin": twin and twin.fingerprint}
    bar = tqdm(total=len(places), desc="probing", unit="place", disable=None, leave=False)
    work = nullcontext() if folder is None else kept(folder, job="probe_features", rows=data, **plain)
    with bar, work as kept_work:
        file = None if kept_work is None else kept_work.inside("places.safetensors")
        done = run_steps(len(places), one_place, start, file)
    table = (len(sites), len(roles), len(steps))
    return ProbeSheet(
        right=done["right"].reshape(*shape[:2], *table, -1),
        validation=done["validation"].reshape(*shape[:2], *table),
        strength=done["strength"].reshape(shape[1], *table),
        guess=torch.tensor([variable.guess_rate(split) for variable in variables], dtype=torch.float64),
        kinds=kinds,
        variables=tuple(variable.name for variable in variables),
        classes=tuple(variable.classes for variable in variables),
        sites=sites,
        roles=roles,
        steps=tuple(step for step in steps if step is not None),
        head=head,
        model=name,
    )


def check_labels(labels: Values, types: Sequence[Hashable] | None = None) -> int:
    """How many rows the labels are of. Raises: InputError if there are none, or they are not as many."""
    counts = {name: len(values) for name, values in labels.items()}
    if types is not None:
        counts["types"] = len(types)
    if not labels or len(set(counts.values())) != 1:
        raise InputError(
            f"Every variable needs one label for each row; there are {counts or 'no variables'}."
        )
    return next(iter(counts.values()))


def _ids(variable: Labels, kind: Kind, types: Sequence[Hashable] | None, seed: int) -> np.ndarray:
    if kind == "shuffled":
        return variable.shuffled(seed)
    return variable.control(types or (), seed) if kind == "control" else variable.ids


def _plain(
    labels: Values,
    types: Sequence[Hashable] | None,
    split: Split,
    head: Head,
    strengths: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    """The settings that the numbers depend on, for `provenance`."""
    return {
        "labels": {name: [str(value) for value in values] for name, values in labels.items()},
        "types": None if types is None else [str(one) for one in types],
        "split": asdict(split),
        "head": head,
        "strengths": list(strengths),
        "seed": seed,
    }


def _n_rows(model: Model, inputs: Mapping[str, Any], site: str) -> int | None:
    """How many rows a batch has at a site; None where its arguments do not say."""
    tower = model.check_tower(site.partition(".")[0])
    raw = "prompt" if model.kind == "diffusion" else "images" if tower.role == "vision" else "text"
    value = inputs.get(tower.input_name, inputs.get(raw))
    if isinstance(value, str):
        return 1
    if not isinstance(value, Sequence | Tensor) or any(isinstance(one, list | tuple) for one in value):
        return None
    return len(value)
