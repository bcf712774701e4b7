"""Interventions on disk: safetensors and JSON, nothing pickled."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyvene as pv
import torch
from torch import Tensor

from integrations.pyvene.interventions import OWN
from mm_adapters import CheckpointError, InputError
from mm_adapters.store import (
    atomic_write,
    exclusive,
    load_tensors,
    read_document,
    save_tensors,
    write_document,
)

# Of a representation, what pyvene links and groups interventions by.
_NOT_SAVED = ("group_key", "intervention_link_key", "moe_key")
_FORMAT = "mm_interp.pyvene/1"
_ENTRIES, _WEIGHTS = "interventions.json", "interventions.safetensors"
_MODES = ("parallel", "serial")
# What `_options` writes.
_OPTIONS = ("keep_last_dim", "subspace_partition", "embed_dim", "low_rank_dimension")
_WITH_SAE = ("SAEIntervention", "SAEInterchange")
_MOST_WIDE = 10**6


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
    document = {"format": _FORMAT, "mode": model.mode, "interventions": entries}
    with exclusive(folder):
        for name, sae in saes.items():
            with atomic_write(folder / name) as draft:
                sae.save_model(draft)
        save_tensors(folder / _WEIGHTS, tensors, {})
        write_document(folder / _ENTRIES, json.loads(json.dumps(document)))


def read(folder: Path) -> pv.IntervenableConfig:
    """What `write` wrote, as a config.

    What the file says is data: a class is one of pyvene's interventions or of ours, an option one that
    `write` knows, a folder lies inside this one.

    Raises: CheckpointError naming the file, for anything else, or if it is missing or damaged.
    """
    file = folder / _ENTRIES
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {_ENTRIES}. Is it the right folder?")
    document = read_document(file, edited=True)
    if document.get("format") != _FORMAT:
        raise CheckpointError(f"{file} has the format {document.get('format')!r}; this reads {_FORMAT!r}.")
    mode, entries = document.get("mode"), document.get("interventions")
    if mode not in _MODES or not isinstance(entries, list):
        raise CheckpointError(f"{file}: mode is {' or '.join(_MODES)}, and interventions a list.")
    tensors, _ = load_tensors(folder / _WEIGHTS)
    configs = []
    for i, entry in enumerate(entries):
        state = {k.removeprefix(f"{i}."): v for k, v in tensors.items() if k.startswith(f"{i}.")}
        where = f"{file}, intervention {i}"
        one = _intervention(where, folder, entry, state)
        keys = ("layer", "component", "unit", "max_number_of_units")
        configs.append(pv.RepresentationConfig(**{k: entry[k] for k in keys}, intervention=one))
    return pv.IntervenableConfig(configs, mode=mode)


def _intervention(where: str, folder: Path, entry: Any, state: dict[str, Tensor]) -> Any:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is a {type(entry).__name__}, not an object.")
    known = {
        "class",
        "module",
        "layer",
        "component",
        "unit",
        "max_number_of_units",
        "options",
        "sae",
        "latents",
    }
    missing, unknown = sorted(known - {"sae", "latents"} - entry.keys()), sorted(entry.keys() - known)
    if missing or unknown:
        raise CheckpointError(f"{where} lacks {missing} and has {unknown}, which nothing reads.")
    for key in ("layer", "component", "unit", "max_number_of_units"):
        value = entry[key]
        is_text = key in ("component", "unit") and isinstance(value, str)
        if not is_text and not (
            key in ("layer", "max_number_of_units") and type(value) is int and value >= 0
        ):
            raise CheckpointError(f"{where}: {key} is {value!r}.")
    kind, options = _class(where, entry["class"]), entry["options"]
    _check_options(where, options, state)
    inside: list[Any] = []
    if issubclass(kind, tuple(OWN[name] for name in _WITH_SAE)):
        inside = [_sae(where, folder, entry.get("sae"))]
        if (latents := entry.get("latents")) is not None:
            if not isinstance(latents, list) or any(type(n) is not int for n in latents):
                raise CheckpointError(f"{where}: latents are numbers, not {latents!r}.")
            inside.append(latents)
    elif "sae" in entry:
        raise CheckpointError(f"{where}: a {kind.__name__} has no SAE.")
    try:
        one = kind(*inside, **options)
    except Exception as error:  # noqa: BLE001  Whatever pyvene's classes say of options that do not go together.
        raise CheckpointError(f"{where}: a {kind.__name__} cannot be made with {options}: {error}") from None
    if "subspace_partition" in options:  # Its indices: pyvene takes two numbers for a first one and an end.
        one.subspace_partition = options["subspace_partition"]
    _restore(where, one, state)
    return one


def _class(where: str, name: Any) -> type[Any]:
    """pyvene's class of this name, if it is an intervention, or ours."""
    kind = OWN.get(name) if isinstance(name, str) else None
    if kind is None and isinstance(name, str) and not name.startswith("_"):
        kind = getattr(pv, name, None)
    if not (isinstance(kind, type) and issubclass(kind, pv.Intervention) and kind.__name__ == name):
        raise CheckpointError(f"{where} is of the class {name!r}, which is no intervention known here.")
    return kind


def _check_options(where: str, options: Any, state: dict[str, Tensor]) -> None:
    """Raises: CheckpointError for an option that `write` does not write, or a value that it cannot have."""
    if not isinstance(options, dict):
        raise CheckpointError(f"{where}: options are an object.")
    width = state.get("embed_dim")
    for name, value in options.items():
        if name not in _OPTIONS:
            raise CheckpointError(f"{where} has the option {name!r}; there is {', '.join(_OPTIONS)}.")
        if name == "keep_last_dim":
            fits = isinstance(value, bool)
        elif name == "subspace_partition":
            fits = isinstance(value, list) and all(_are_indices(part) for part in value)
        else:
            fits = type(value) is int and 0 < value <= _MOST_WIDE
        if name == "embed_dim" and width is not None:
            fits = fits and int(width) == value
        if not fits:
            raise CheckpointError(f"{where}: {name} is {value!r}, which it cannot be.")
    rank = options.get("low_rank_dimension")
    if rank is not None and rank > options.get("embed_dim", rank):
        raise CheckpointError(f"{where}: low_rank_dimension is {rank}, more than embed_dim.")
    last = max(itertools.chain(*options.get("subspace_partition", ())), default=-1)
    if last >= options.get("embed_dim", last + 1):
        raise CheckpointError(f"{where}: subspace_partition has the index {last}, not less than embed_dim.")


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _MOST_WIDE for n in value)


def _sae(where: str, folder: Path, name: Any) -> Any:
    """The SAE in a folder of this one. Raises: CheckpointError for any other place."""
    from sae_lens import SAE

    inside = isinstance(name, str) and name.startswith("sae_") and name[4:].isdigit()
    place = folder / str(name)
    if not inside or place.resolve().parent != folder.resolve():
        raise CheckpointError(
            f"{where}: its SAE is at {name!r}, and may only be in a folder sae_N of this one."
        )
    read_document(place / "cfg.json", edited=True)
    load_tensors(place / "sae_weights.safetensors")
    try:
        return SAE.load_from_disk(place)
    except Exception as error:  # noqa: BLE001  Whatever SAELens says of a configuration that does not fit.
        raise CheckpointError(f"{place} holds no SAE that can be loaded: {error}") from None


Trained = Sequence[tuple[str, Any]]


def write_weights(trained: Trained, of_model: Mapping[str, Tensor], folder: Path) -> None:
    """Writes what interventions learned, and weights of the model, into "weights.safetensors"."""
    tensors = _named(trained) | dict(of_model)
    with exclusive(folder):
        kept = {name: p.detach().contiguous().clone() for name, p in tensors.items()}
        save_tensors(folder / "weights.safetensors", kept, {})


@torch.no_grad()
def read_weights(trained: Trained, of_model: Mapping[str, Tensor], folder: Path) -> None:
    """Reads what `write_weights` wrote into interventions and weights of the same names.

    Raises: CheckpointError if there are none in the folder, or others; then nothing is changed.
    """
    path = folder / "weights.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no weights.safetensors. Is it the right folder?")
    stored, _ = load_tensors(path)
    here = {name: tuple(p.shape) for name, p in (_named(trained) | dict(of_model)).items()}
    there = {name: tuple(p.shape) for name, p in stored.items()}
    if here != there:
        raise CheckpointError(f"{path} has the weights {there}, and what trains here is {here}.")
    for key, one in trained:
        _restore(f"{path}, {key}", one, {name: stored[f"{key}.{name}"] for name in _state(one)})
    for name, p in of_model.items():
        p.copy_(stored[name])


def _named(trained: Trained) -> dict[str, Tensor]:
    return {f"{key}.{name}": value for key, one in trained for name, value in _state(one).items()}


def _state(one: Any) -> dict[str, Tensor]:
    state = one.state_dict().items()
    return {k: v for k, v in state if isinstance(v, Tensor) and not k.startswith("sae.")}


def _restore(where: str, one: Any, state: dict[str, Tensor]) -> None:
    """Loads weights; an orthogonal rotation is set through its own parametrization.

    Raises: CheckpointError for weights that are missing, of another shape, no fractions, or not finite.
    """
    own = _state(one)
    missing = sorted(set(own) - set(state))
    known = {k: v for k, v in state.items() if k in one.state_dict()}
    if missing:
        raise CheckpointError(f"{where}: a {type(one).__name__} lacks the weights {missing}.")
    for name, value in known.items():
        if name in own and (value.shape != own[name].shape or value.dtype != own[name].dtype):
            raise CheckpointError(
                f"{where}: {name} is {value.dtype} {list(value.shape)}, and a {type(one).__name__} has "
                f"{own[name].dtype} {list(own[name].shape)}."
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(f"{where}: {name} holds NaN or infinity.")
    one.load_state_dict(known, strict=False)
    source = state.get("source_representation")
    if source is None or "source_representation" in known:
        return
    if not source.is_floating_point() or not bool(source.isfinite().all()):
        raise CheckpointError(f"{where}: source_representation holds what is no finite fraction.")
    del one.source_representation  # None, a plain attribute, whose name pyvene's setter wants free.
    one.set_source_representation(source)


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
