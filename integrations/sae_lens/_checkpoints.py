"""The whole state of training, in one folder that is there as a whole or not at all. No pickles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.training.activation_scaler import ActivationWhitening
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from mm_adapters import CheckpointError, StoreError
from mm_adapters.store import (
    atomic_write,
    check_same_work,
    load_tensors,
    read_document,
    save_tensors,
    write_document,
)

_NUMBERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples", "started_fine_tuning")
_TENSORS = ("act_freq_scores", "n_forward_passes_since_fired")
_WHITENING = ("mean", "matrix", "inverse_matrix")
_KEPT = 2
_RECENT = "recent"


def save(
    folder: Path,
    trainers: Mapping[str, SAETrainer[Any, Any]],
    about: Mapping[str, Any],
    position: Any,
    *,
    durable: bool = True,
) -> Path:
    """Writes step_N beside its predecessors, of which the last is kept.

    `position` is the provider's: which batch comes next. If not `durable`, it is called "recent" and takes
    the place of the one before: it outlives the process, and not for certain a power failure.
    """
    step = next(iter(trainers.values())).n_training_steps
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    plain: dict[str, Any] = {}
    for i, (name, trainer) in enumerate(trainers.items()):
        state, plain[name] = _state(trainer)
        tensors |= {f"{i}/{key}": value for key, value in state.items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    document = {"about": about, "position": position, "trainers": plain}
    target = folder / (f"step_{step:09d}" if durable else _RECENT)
    with atomic_write(target, durable=durable) as draft:
        draft.mkdir(parents=True)
        save_tensors(draft / "state.safetensors", tensors, {"step": str(step)}, durable=durable)
        write_document(
            draft / "state.json", json.loads(json.dumps(document)) | {"step": step}, durable=durable
        )
    if durable:
        for old in (*_all(folder)[:-_KEPT], folder / _RECENT):
            shutil.rmtree(old, ignore_errors=True)
    return target


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, if there is one; a recent one that is damaged is as good as none."""
    checkpoints = _all(folder)
    newest = checkpoints[-1] if checkpoints else None
    recent = folder / _RECENT
    try:
        step = read_document(recent / "state.json").get("step", -1)
        load_tensors(recent / "state.safetensors")
    except CheckpointError:
        return newest
    return recent if newest is None or step > int(newest.name.removeprefix("step_")) else newest


def load(path: Path, trainers: Mapping[str, SAETrainer[Any, Any]], about: Mapping[str, Any]) -> Any:
    """Gives the trainers the state they had; returns the provider's position.

    Raises: StoreError if the checkpoint is of other training, or damaged.
    """
    try:
        document = read_document(path / "state.json")
        tensors, facts = load_tensors(path / "state.safetensors")
        if facts.get("step") != str(document.get("step")):
            raise CheckpointError(f"{path}: its two files are not of one step of training.")
    except CheckpointError as error:
        raise StoreError(f"{error} Or delete {path} to go on from before it.") from None
    check_same_work(path.parents[1], document["about"], json.loads(json.dumps(about)))
    for i, (name, trainer) in enumerate(trainers.items()):
        state = {k.removeprefix(f"{i}/"): v for k, v in tensors.items() if k.startswith(f"{i}/")}
        _restore(trainer, state, document["trainers"][name])
    torch.set_rng_state(tensors["rng"])
    return document["position"]


def _all(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if p.suffix != ".tmp")


def _state(trainer: SAETrainer[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"sae/{k}": v for k, v in trainer.sae.state_dict().items()}
    tensors |= {key: getattr(trainer, key) for key in _TENSORS}
    optimizer = trainer.optimizer.state_dict()
    for number, moments in optimizer["state"].items():
        tensors |= {f"optimizer/{number}/{k}": v for k, v in moments.items()}
    whitening = trainer.activation_scaler.whitening
    if whitening is not None:
        tensors |= {f"whitening/{key}": getattr(whitening, key) for key in _WHITENING}
    plain: dict[str, Any] = {key: getattr(trainer, key) for key in _NUMBERS}
    plain["param_groups"] = optimizer["param_groups"]
    plain["lr_scheduler"] = trainer.lr_scheduler.state_dict()
    plain["coefficients"] = {k: v.state_dict() for k, v in trainer.coefficient_schedulers.items()}
    plain["scaling_factor"] = trainer.activation_scaler.scaling_factor
    return tensors, plain


def _restore(trainer: SAETrainer[Any, Any], tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    device = trainer.cfg.device
    weights = {k.removeprefix("sae/"): v for k, v in tensors.items() if k.startswith("sae/")}
    trainer.sae.load_state_dict(weights)
    for key in _TENSORS:
        setattr(trainer, key, tensors[key].to(device))
    for key in _NUMBERS:
        setattr(trainer, key, plain[key])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, number, name = key.split("/")
            moments.setdefault(int(number), {})[name] = value
    trainer.optimizer.load_state_dict({"state": moments, "param_groups": plain["param_groups"]})
    trainer.lr_scheduler.load_state_dict(plain["lr_scheduler"])
    for key, value in plain["coefficients"].items():
        trainer.coefficient_schedulers[key].load_state_dict(value)
    trainer.activation_scaler.scaling_factor = plain["scaling_factor"]
    if "whitening/mean" in tensors:
        trainer.activation_scaler.whitening = ActivationWhitening(
            *(tensors[f"whitening/{key}"] for key in _WHITENING)
        )
