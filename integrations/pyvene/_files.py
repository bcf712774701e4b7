"""Interventions on disk: safetensors and JSON, nothing pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyvene as pv
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from integrations.pyvene.interventions import OWN
from mm_adapters import CheckpointError, InputError
from mm_adapters.store import atomic_write

# Of a representation, what pyvene links and groups interventions by.
_NOT_SAVED = ("group_key", "intervention_link_key", "moe_key")


def write(model: Any, folder: Path) -> None:
    """Writes the interventions as safetensors and JSON: their class, site, options and weights.

    Raises: InputError before anything is written, for an intervention with what the format has no room for.
    """
    tensors: dict[str, Tensor] = {}
    entries = []
    saes: dict[str, Any] = {}
    for i, (key, one) in enumerate(model.interventions.items()):
        location = model.representations[key]
        if not hasattr(pv, type(one).__name__) and type(one).__name__ not in OWN:
            raise InputError(f"A {type(one).__name__} cannot be saved; save what is inside it.")
        if getattr(one, "change", None) is not None:
            raise InputError("A function cannot be saved, so an SAEIntervention with a change cannot be.")
        lost = [name for name in _NOT_SAVED if getattr(location, name) not in (None, [None])]
        if lost:
            raise InputError(f"{key}: its {', '.join(lost)} cannot be saved.")
        state = {f"{i}.{k}": v.detach().contiguous().clone() for k, v in _state(one).items()}
        tensors |= state
        entries.append(
            {
                "class": type(one).__name__,
                "module": type(one).__module__,
                "layer": location.layer,
                "component": location.component,
                "unit": location.unit,
                "max_number_of_units": location.max_number_of_units,
                "options": _options(one),
            }
        )
        sae: Any = getattr(one, "sae", None)
        if sae is not None:
            saes[f"sae_{i}"] = sae
            entries[-1] |= {"sae": f"sae_{i}", "latents": getattr(one, "latents", None)}
    document = {"format": "mm_interp.pyvene/1", "mode": model.mode, "interventions": entries}
    folder.mkdir(parents=True, exist_ok=True)
    for name, sae in saes.items():
        with atomic_write(folder / name) as draft:
            sae.save_model(draft)
    with atomic_write(folder / "interventions.safetensors") as draft:
        save_file(tensors, draft)
    with atomic_write(folder / "interventions.json") as draft:
        draft.write_text(json.dumps(document, indent=1))


def read(folder: Path) -> pv.IntervenableConfig:
    """What `write` wrote, as a config.

    Raises: CheckpointError if the folder has none, or an intervention of no known class.
    """
    if not (folder / "interventions.json").is_file():
        raise CheckpointError(f"{folder} has no interventions.json. Is it the right folder?")
    document = json.loads((folder / "interventions.json").read_text())
    tensors = load_file(folder / "interventions.safetensors")
    configs = []
    for i, entry in enumerate(document["interventions"]):
        kind = getattr(pv, entry["class"], None) or OWN.get(entry["class"])
        if kind is None:
            raise CheckpointError(
                f"{folder} has an intervention {entry['class']!r}, which is no class known here."
            )
        inside: list[Any] = []
        if "sae" in entry:
            from sae_lens import SAE

            inside = [SAE.load_from_disk(folder / entry["sae"])]
            inside += [] if entry["latents"] is None else [entry["latents"]]
        one = kind(*inside, **entry["options"])
        state = {k.removeprefix(f"{i}."): v for k, v in tensors.items() if k.startswith(f"{i}.")}
        _restore(one, state)
        keys = ("layer", "component", "unit", "max_number_of_units")
        configs.append(pv.RepresentationConfig(**{k: entry[k] for k in keys}, intervention=one))
    return pv.IntervenableConfig(configs, mode=document["mode"])


Trained = Sequence[tuple[str, Any]]


def write_weights(trained: Trained, of_model: Mapping[str, Tensor], folder: Path) -> None:
    """Writes what interventions learned, and weights of the model, into "weights.safetensors"."""
    tensors = _named(trained) | dict(of_model)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "weights.safetensors") as draft:
        save_file({name: p.detach().contiguous().clone() for name, p in tensors.items()}, draft)


@torch.no_grad()
def read_weights(trained: Trained, of_model: Mapping[str, Tensor], folder: Path) -> None:
    """Reads what `write_weights` wrote into interventions and weights of the same names.

    Raises: CheckpointError if there are none in the folder, or others; then nothing is changed.
    """
    path = folder / "weights.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no weights.safetensors. Is it the right folder?")
    stored = load_file(path)
    here = {name: tuple(p.shape) for name, p in (_named(trained) | dict(of_model)).items()}
    there = {name: tuple(p.shape) for name, p in stored.items()}
    if here != there:
        raise CheckpointError(f"{path} has the weights {there}, and what trains here is {here}.")
    for key, one in trained:
        _restore(one, {name: stored[f"{key}.{name}"] for name in _state(one)})
    for name, p in of_model.items():
        p.copy_(stored[name])


def _named(trained: Trained) -> dict[str, Tensor]:
    return {f"{key}.{name}": value for key, one in trained for name, value in _state(one).items()}


def _state(one: Any) -> dict[str, Tensor]:
    state = one.state_dict().items()
    return {k: v for k, v in state if isinstance(v, Tensor) and not k.startswith("sae.")}


def _restore(one: Any, state: dict[str, Tensor]) -> None:
    """Loads weights; an orthogonal rotation is set through its own parametrization."""
    missing = set(_state(one)) - set(state)
    known = {k: v for k, v in state.items() if k in one.state_dict()}
    if missing:
        raise CheckpointError(f"{type(one).__name__} lacks the weights {sorted(missing)}.")
    one.load_state_dict(known, strict=False)
    if "source_representation" in state:
        one.set_source_representation(state["source_representation"])


def _options(one: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"keep_last_dim": bool(one.keep_last_dim)}
    if getattr(one, "subspace_partition", None) is not None:
        options["subspace_partition"] = one.subspace_partition
    if getattr(one, "embed_dim", None) is not None:
        options["embed_dim"] = int(one.embed_dim)
    layer = getattr(one, "rotate_layer", None)
    if isinstance(one, pv.LowRankRotatedSpaceIntervention) and layer is not None:
        options["low_rank_dimension"] = int(layer.weight.shape[-1])
    return options
