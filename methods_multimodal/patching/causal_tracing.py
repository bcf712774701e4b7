"""Which states of which tokens at which layers give a corrupted run its answer back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.kept import kept
from methods_multimodal.core.model import check_sites, prepared_once
from methods_multimodal.core.record import Record
from methods_multimodal.core.running import State, run_steps
from methods_multimodal.core.statistics import paired_interval
from methods_multimodal.patching.attention_knockout import Metric
from methods_multimodal.patching.corruption import Corruption
from methods_multimodal.patching.roles import TokenRoles
from mm_adapters import Edit, InputError, Model


@dataclass(frozen=True)
class Share:
    """The share of the whole effect that each window and role gives back, with its interval."""

    mean: Float[Tensor, "window role"]
    low: Float[Tensor, "window role"]
    high: Float[Tensor, "window role"]


@dataclass(frozen=True)
class CausalTrace(Record):
    """The metric of each row with the states of one role in one window of layers taken from the other run.

    With `into` "corrupted" the clean run's states are restored in the corrupted run; with "clean" the
    corrupted run's are put into the clean one. `part` is what is taken of each layer.
    """

    patched: Float[Tensor, "row window role"]
    clean: Float[Tensor, " row"]
    corrupted: Float[Tensor, " row"]
    roles: tuple[str, ...]
    windows: tuple[tuple[int, ...], ...]
    part: str
    tower: str
    into: str
    corruption: str

    @property
    def effect(self) -> Float[Tensor, "row window role"]:
        """How far the metric moves from that of the run that is patched."""
        base = self.corrupted if self.into == "corrupted" else self.clean
        return self.patched - base[:, None, None]

    def share(self, level: float = 0.95) -> Share:
        """The mean effect over the mean of the whole (a ratio of means), rows drawn again for its interval.

        1: all of the difference between the two runs; 0: none. Raises: InputError if the means are the same.
        """
        gap = self.clean - self.corrupted if self.into == "corrupted" else self.corrupted - self.clean
        if float(gap.mean()) == 0:
            raise InputError("The metric is the same in both runs, so an effect has no scale. Corrupt more.")
        effect = self.effect.permute(1, 2, 0).double().cpu().numpy()
        whole = np.broadcast_to(gap.double().cpu().numpy(), effect.shape)

        def ratio(one: NDArray[Any], all_of: NDArray[Any], axis: int = -1) -> NDArray[Any]:
            return one.mean(axis) / all_of.mean(axis)

        low, high = paired_interval(ratio, effect, whole, level=level)
        return Share(*(torch.from_numpy(np.asarray(x)).float() for x in (ratio(effect, whole), low, high)))


def trace(
    model: Model,
    clean: Mapping[str, Any],
    corruption: Corruption,
    metric: Metric,
    roles: TokenRoles | Mapping[str, Bool[Tensor, "row pos"]],
    *,
    tower: str = "language",
    part: str = "hook_resid_pre",
    layers: Sequence[int] | None = None,
    window: int = 1,
    into: str = "corrupted",
    folder: str | Path | None = None,
) -> CausalTrace:
    """Patches each role's states in each window of layers, from the clean run into the corrupted one or back.

    Args:
        model: What is run.
        clean: Raw or prepared inputs.
        corruption: The corrupted run: `noised`, `averaged`, `resampled`, `other_pictures`, `other_words`.
        metric: Maps the model's output to one number for each row.
        roles: The positions by role, of this tower.
        tower: Whose states; it may be another than the one that is corrupted.
        part: What is taken of a layer: "hook_resid_pre" or "hook_resid_post" (the state), "hook_attn_out",
            "hook_mlp_out", "attn.hook_z", ...
        layers: In which layers a window may begin (None: all).
        window: How many layers in a row are patched together; fewer at the last.
        into: "corrupted" (restoring: what suffices) or "clean" (disrupting: what is needed).
        folder: Where runs are written down as they are done, so that a call that was killed goes on.

    Source: Meng et al. 2022, arXiv 2202.05262, section 2; for VLMs Palit et al. 2023, arXiv 2308.14179, Basu
        et al. 2024, arXiv 2406.04236.
    Raises: MissingSiteError for a layer without the part; InputError if the roles do not fit the tower's
        positions or a setting is not one, before anything is patched.
    """
    view = model.check_tower(tower)
    if into not in ("clean", "corrupted"):
        raise InputError(f"into={into!r}: what is patched is the 'clean' run or the 'corrupted' one.")
    if window < 1:
        raise InputError(f"window={window}: a window holds at least one layer.")
    n_layers = max(1, view.n_layers())
    starts = list(range(n_layers)) if layers is None else [int(i) for i in layers]
    windows = [tuple(range(i, max(i + 1, min(i + window, n_layers)))) for i in starts]
    sites = [[f"{tower}.blocks.{i}.{part}" for i in of_window] for of_window in windows]
    every = sorted({site for of_window in sites for site in of_window})
    check_sites(model, every)
    masks = dict(roles.masks if isinstance(roles, TokenRoles) else roles)
    ready = prepared_once(model, clean)
    corrupt_inputs = prepared_once(model, corruption.inputs)
    runs = {
        "clean": model.run(ready, read=every if into == "corrupted" else ()),
        "corrupted": model.run(corrupt_inputs, read=every if into == "clean" else (), edit=corruption.edits),
    }
    values = {side: metric(run.output).detach().float() for side, run in runs.items()}
    source = runs["clean" if into == "corrupted" else "corrupted"].values
    _check_masks(masks, {site: source[site] for site in every})
    target, first = (corrupt_inputs, corruption.edits) if into == "corrupted" else (ready, ())
    jobs = [(w, role) for w in range(len(windows)) for role in masks]
    bar = tqdm(total=len(jobs), desc="tracing", unit="run", disable=None, leave=False)

    def one_run(sofar: State, number: int) -> State:
        w, role = jobs[number]
        edits = [Edit(site, _putting(source[site], masks[role])) for site in sites[w]]
        patched = sofar["patched"].clone()
        output = model.run(target, edit=[*first, *edits]).output
        patched[:, w, list(masks).index(role)] = metric(output).detach().float()
        bar.update()
        return {"patched": patched}

    made_of: dict[str, Any] = {
        "models": {"model": model},
        "data": [ready, corrupt_inputs, masks],
        "metric": metric,
    }
    made_of |= {"sites": sites, "into": into, "corruption": corruption.what}
    made_of |= {"values": {side: value.tolist() for side, value in values.items()}}
    start = {"patched": values[into].new_zeros(len(values[into]), len(windows), len(masks))}
    with bar, kept(folder, job="trace", **made_of) as work:
        patched = run_steps(len(jobs), one_run, start, work.inside("runs.safetensors"))["patched"]
    return CausalTrace(
        patched=patched,
        clean=values["clean"],
        corrupted=values["corrupted"],
        roles=tuple(masks),
        windows=tuple(windows),
        part=part,
        tower=tower,
        into=into,
        corruption=corruption.what,
    )


def _putting(value: Tensor, mask: Bool[Tensor, "row pos"]) -> Callable[[Tensor], Tensor]:
    def put(here: Tensor) -> Tensor:
        where = mask.to(here.device).reshape(*mask.shape, *(1,) * (here.ndim - 2))
        return torch.where(where, value.to(here), here)

    return put


def _check_masks(masks: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    if not masks:
        raise InputError("There is no role to patch. Give masks [row, pos] by name.")
    for role, mask in masks.items():
        for site, value in values.items():
            if tuple(mask.shape) != tuple(value.shape[:2]):
                raise InputError(
                    f"{role}: its mask is {list(mask.shape)}, and {site} has {value.shape[0]} rows of "
                    f"{value.shape[1]} positions. Ask `token_roles` for those of this tower."
                )
