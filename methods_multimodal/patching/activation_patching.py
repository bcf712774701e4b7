"""Which activations carry the difference between two inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.kept import kept
from methods_multimodal.core.model import check_sites
from methods_multimodal.core.positions import in_rows
from methods_multimodal.core.record import Record
from methods_multimodal.core.running import State, run_steps
from mm_adapters import Edit, InputError, Model, Read

Metric = Callable[[Any], Tensor]
_AXES = {"pos": 1, "head": 2}


@dataclass(frozen=True)
class ActivationPatching(Record):
    """The metric after one piece of the clean run was put into the corrupted one.

    Piece `unit` of layer `layer` is `units[unit]`: heads, or positions, of `site` there.
    """

    patched: Float[Tensor, "row layer unit"]
    clean: Float[Tensor, " row"]
    corrupted: Float[Tensor, " row"]
    site: str
    axis: str
    layers: tuple[int, ...]
    units: tuple[tuple[int, ...], ...]

    @property
    def effect(self) -> Float[Tensor, "row layer unit"]:
        """0: the metric is as in the corrupted run. 1: it is as in the clean one.

        Raises: InputError if the metric is the same in both.
        """
        gap = self.clean - self.corrupted
        if not bool((gap != 0).all()):
            raise InputError("The metric is the same for both inputs, so an effect has no scale.")
        return (self.patched - self.corrupted[:, None, None]) / gap[:, None, None]


def patch_heads(
    model: Model,
    clean: Mapping[str, Any],
    corrupted: Mapping[str, Any],
    metric: Metric,
    *,
    tower: str,
    layers: Sequence[int],
    stacked: Collection[str] | None = None,
    batch: int = 64,
    folder: str | Path | None = None,
) -> ActivationPatching:
    """Patches each head's z of each layer, at all positions. The rest as in `patch_units`."""
    site = f"{tower}.blocks.{{}}.attn.hook_z"
    options: dict[str, Any] = {"layers": layers, "stacked": stacked, "batch": batch, "folder": folder}
    return patch_units(model, clean, corrupted, metric, site, "head", **options)


def patch_positions(
    model: Model,
    clean: Mapping[str, Any],
    corrupted: Mapping[str, Any],
    metric: Metric,
    *,
    tower: str,
    layers: Sequence[int],
    units: Sequence[Sequence[int]] | None = None,
    stacked: Collection[str] | None = None,
    batch: int = 64,
    folder: str | Path | None = None,
) -> ActivationPatching:
    """Patches each position (or each group of them in `units`) of each layer's input.

    Of a text or language tower -1 is each row's last attended position. The rest as in `patch_units`.
    """
    site = f"{tower}.blocks.{{}}.hook_resid_pre"
    options: dict[str, Any] = {"layers": layers, "stacked": stacked, "batch": batch, "folder": folder}
    return patch_units(model, clean, corrupted, metric, site, "pos", units=units, **options)


def patch_units(
    model: Model,
    clean: Mapping[str, Any],
    corrupted: Mapping[str, Any],
    metric: Metric,
    site: str,
    axis: str,
    *,
    layers: Sequence[int],
    units: Sequence[Sequence[int]] | None = None,
    stacked: Collection[str] | None = None,
    batch: int = 64,
    folder: str | Path | None = None,
) -> ActivationPatching:
    """Runs the corrupted input once for each layer and unit, with that unit taken from the clean run.

    The corrupted input is copied along the batch, so that many units share a run.

    Args:
        clean: The input whose values are put in.
        corrupted: The input that is run, of the same shape.
        metric: Maps the model's output to one number for each row.
        site: The site of each layer, with "{}" where the layer goes.
        axis: What a unit is: "head" (of a site [batch, pos, head, d_head]) or "pos".
        layers: Which layers are patched, one at a time.
        units: Groups of heads or positions that are patched together (None: each by itself). Below 0 they
            count back: heads from the last, positions of text from each row's last attended one.
        stacked: The arguments that have a row for each input (None: every tensor does, if all have as many
            rows; empty: nothing is stacked and units run one by one).
        batch: The most rows of one run.
        folder: Where runs are written down as they are done, so that a call that was killed goes on.

    Source: Meng et al. 2022, arXiv 2202.05262; Heimersheim and Nanda 2024, arXiv 2404.15255.
    Raises: MissingSiteError for a layer without the site; InputError if the two inputs differ in shape, the
        layers in how many units they have, or there is no such unit; StoreError for a folder of other work.
    """
    names = {layer: site.format(layer) for layer in layers}
    check_sites(model, names.values())
    _check_same_shape(clean, corrupted)
    places = {
        unit: tuple(_place(model, inputs, unit, site, axis) for inputs in (clean, corrupted))
        for unit in {int(i) for group in units or () for i in group}
    }
    source = model.run(clean, read=[Read(name) for name in names.values()])
    base = metric(model.run(corrupted).output).detach().float()
    n_rows, dim = len(base), _AXES[axis]
    if units is None:
        counts = sorted({source[name].shape[dim] for name in names.values()})
        if len(counts) > 1:
            raise InputError(
                f"The layers differ in how many units {site} has: {', '.join(map(str, counts))}. Patch those "
                "with as many together, or give the units."
            )
        units = [(i,) for i in range(counts[0])]
        places = {i: (torch.tensor(i),) * 2 for i in range(counts[0])}
    groups = tuple(tuple(int(i) for i in unit) for unit in units)
    _check_there(groups, min(source[name].shape[dim] for name in names.values()), site)
    per_run = max(1, batch // n_rows) if _stacks(model, site, corrupted, stacked, n_rows) else 1
    pairs = [[_side_by_side([places[unit][side] for unit in group]) for side in (0, 1)] for group in groups]
    chunks = [pairs[i : i + per_run] for i in range(0, len(pairs), per_run)]
    n_runs = len(names) * len(chunks)
    bar = tqdm(total=n_runs, desc="patching", unit="run", disable=None, leave=False)

    def one_run(sofar: State, number: int) -> State:
        layer, chunk = divmod(number, len(chunks))
        name, first, pieces = list(names.values())[layer], chunk * per_run, chunks[chunk]
        edit = Edit(name, _swap(source[name], pieces, dim))
        output = model.run(_stack(corrupted, len(pieces), stacked), edit=[edit]).output
        patched = sofar["patched"].clone()
        effects = rearrange(metric(output).detach().float(), "(u r) -> r u", u=len(pieces))
        patched[:, layer, first : first + len(pieces)] = effects
        bar.update()
        return {"patched": patched}

    made_of: dict[str, Any] = {"models": {"model": model}, "data": [clean, corrupted], "site": site}
    made_of |= {"axis": axis, "layers": list(names), "units": groups}
    made_of |= {"metric": metric, "rows": per_run, "stacked": None if stacked is None else sorted(stacked)}
    start = {"patched": base.new_zeros(n_rows, len(names), len(groups))}
    with bar, kept(folder, job="patch_units", **made_of) as work:
        file = work.inside("runs.safetensors")
        patched = run_steps(n_runs, one_run, start, file)["patched"]
    return ActivationPatching(
        patched=patched,
        clean=metric(source.output).detach().float(),
        corrupted=base,
        site=site,
        axis=axis,
        layers=tuple(int(layer) for layer in layers),
        units=groups,
    )


def _place(model: Model, inputs: Mapping[str, Any], unit: int, site: str, axis: str) -> Tensor:
    """Where a unit stands: one number, or one for each row.

    Raises: InputError if a row has no such position.
    """
    tower, stack, *_ = site.split(".")
    if unit >= 0 or axis != "pos":
        return torch.tensor(unit)
    if stack == "decoder":
        raise InputError(f"units: the positions of {site} are counted from 0, not {unit}.")
    return torch.as_tensor(in_rows(model, inputs, unit, tower).index)


def _side_by_side(places: Sequence[Tensor]) -> Tensor:
    """[row or 1, unit]: where each unit stands, in all rows alike or in each."""
    return torch.stack(torch.broadcast_tensors(*(place.reshape(-1) for place in places)), 1)


def _swap(clean: Tensor, chunk: Sequence[Sequence[Tensor]], dim: int) -> Callable[[Tensor], Tensor]:
    """An edit that gives each unit, in its own copy of the rows, its clean value.

    A unit is where it stands in the clean rows, and where in the corrupted ones.
    """
    rows = torch.arange(len(clean), device=clean.device)[:, None]
    before = (slice(None),) * (dim - 1)

    def swap(value: Tensor) -> Tensor:
        copies = rearrange(value.clone(), "(u r) ... -> u r ...", u=len(chunk))
        for copy, (source, target) in zip(copies, chunk, strict=True):
            new = clean[rows, *before, source.to(clean.device)]
            copy[rows.to(copy.device), *before, target.to(copy.device)] = new.to(copy)
        return rearrange(copies, "u r ... -> (u r) ...")

    return swap


def _check_there(groups: Sequence[Sequence[int]], n: int, site: str) -> None:
    for unit in (unit for group in groups for unit in group):
        if not -n <= unit < n:
            raise InputError(f"There is no unit {unit}: {site} has units 0 to {n - 1}.")


def _stacks(
    model: Model, site: str, inputs: Mapping[str, Any], stacked: Collection[str] | None, n_rows: int
) -> bool:
    """Whether copies of the inputs can share a run."""
    tower = model.check_tower(site.partition(".")[0]).record
    if tower.packed or tower.order == "end to end":  # The patches of all images are one row.
        return False
    if stacked is not None:
        return bool(stacked)
    # Composite models have arguments with a row for each image, or patch, of a row.
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim]
    return model.kind in ("contrastive", "vlm") or all(len(value) == n_rows for value in tensors)


def _stack(inputs: Mapping[str, Any], copies: int, stacked: Collection[str] | None) -> dict[str, Any]:
    if copies == 1:
        return dict(inputs)
    return {
        key: repeat(value, "r ... -> (u r) ...", u=copies)
        if isinstance(value, Tensor) and value.ndim and (stacked is None or key in stacked)
        else value
        for key, value in inputs.items()
    }


def _check_same_shape(clean: Mapping[str, Any], corrupted: Mapping[str, Any]) -> None:
    for key in clean.keys() | corrupted.keys():
        one, two = clean.get(key), corrupted.get(key)
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else None for x in (one, two)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"Patching needs two inputs of one shape; {key} is {shapes[0]} in the clean one and "
                f"{shapes[1]} in the corrupted one."
            )
