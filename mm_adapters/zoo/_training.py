"""One training loop for every model of the zoo: a bar, checkpoints, and resuming after a kill.

A loss must be a pure function of the weights and the step's number. Then the weights, the
optimiser's state and the number of steps done are the whole state of a run, and a run that was
killed continues to exactly the result it would have had.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from mm_adapters._errors import CheckpointError, StoreError
from mm_adapters.storage.fingerprint import of_module
from mm_adapters.storage.provenance import provenance, work_folder
from mm_adapters.storage.save_clock import SaveClock
from mm_adapters.storage.tensor_files import load_tensors, save_tensors


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model learns; the rate warms up and then falls along a cosine."""

    steps: int
    peak_rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    average: float | None = None
    checkpoint_every: int = 200
    stop_after: int | None = None

    def rate(self, step: int) -> float:
        """The learning rate of this step."""
        rising = (step + 1) / self.warmup
        done = min(1.0, step / max(1, self.steps))
        return self.peak_rate * min(rising, 0.02 + 0.49 * (1 + math.cos(math.pi * done)))


def seeded(*numbers: int) -> torch.Generator:
    """A generator that is a pure function of these numbers."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _FullAttention(TorchFunctionMode):
    """Attention in float32: its backward pass on a CPU is slower in bfloat16, not faster."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        args = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        moved = {
            k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in (kwargs or {}).items()
        }
        with torch.autocast(device().type, enabled=False):
            return func(*args, **moved)


def _has_bfloat16() -> bool:
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False))


@contextmanager
def mixed() -> Iterator[None]:
    """Matrix products and convolutions in bfloat16, everything else in float32; float32 throughout on a
    processor that has no bfloat16, where it is many times slower."""
    if device().type == "cpu" and not _has_bfloat16():
        yield
        return
    with torch.autocast(device().type, torch.bfloat16), _FullAttention():
        yield


def training_folder(
    folder: Path,
    recipe: ModuleType,
    schedules: Mapping[str, Schedule],
    seed: int,
    *,
    data: Any,
    begins_with: Mapping[str, nn.Module],
) -> AbstractContextManager[Path]:
    """The folder of one training, which holds no other: what it is made of is written there first.

    Args:
        folder: Where the checkpoints are.
        recipe: The module that trains; its constants (batch sizes, weights of losses) are settings.
        schedules: Each stage's.
        seed: Of the weights and the data.
        data: What the training set begins with, pictures and texts: a changed recipe changes them.
        begins_with: The untrained model, and those that it is built on.

    Raises: StoreError for a folder of another training, or one in which another process works.
    """
    plain = bool | int | float | str | tuple
    constants = {k: v for k, v in vars(recipe).items() if k.isupper() and isinstance(v, plain)}
    made_of = provenance(
        job=f"training of {recipe.__name__.rpartition('.')[2]}",
        schedules={stage: _run_of(schedule) for stage, schedule in schedules.items()},
        seed=seed,
        constants=constants,
        data=data,
    )
    modules = {name: of_module(module) for name, module in begins_with.items()}
    return work_folder(folder, made_of | modules)


def _run_of(schedule: Schedule) -> dict[str, Any]:
    """What of a schedule the weights depend on: where a run stops, another goes on."""
    return {k: v for k, v in asdict(schedule).items() if k not in ("checkpoint_every", "stop_after")}


def fit(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    schedule: Schedule,
    checkpoint: Path,
    *,
    resume: bool = False,
    seed: int | None = None,
) -> float:
    """Trains the parameters that require gradients, in place; returns the seconds it took in all.

    Leaves the moving average of the weights in the model where `schedule.average` asks for one.
    With `resume`, continues from the checkpoint if there is one, of the same schedule and `seed`. A
    checkpoint is written every so many steps, and before if that costs little of the time.

    Raises: StoreError if the checkpoint is of another run, or damaged.
    """
    run = _run_of(schedule) | {"seed": seed}
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decayed = [p for p in named.values() if p.ndim >= 2]
    plain = [p for p in named.values() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    averages = {n: p.detach().clone() for n, p in named.items()} if schedule.average else {}

    first, spent_s = 0, 0.0
    if resume and checkpoint.exists():
        first, spent_s = _restore(checkpoint, run, named, optimiser, averages)
    last = min(schedule.steps, schedule.stop_after or schedule.steps)
    model.train()
    began = time.monotonic() - spent_s
    clock = SaveClock(n=last - first)
    bar = tqdm(range(first, last), initial=first, total=last, desc=checkpoint.stem, mininterval=5)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_at(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimiser.step()
        if schedule.average:
            # Early weights are worth little: the average forgets faster at first.
            keep = min(schedule.average, (1 + step) / (10 + step))
            for name, parameter in named.items():
                averages[name].lerp_(parameter.detach(), 1 - keep)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        is_sure = (step + 1) % schedule.checkpoint_every == 0 or step + 1 == last
        if is_sure or clock.is_due():
            spent_s = time.monotonic() - began
            with clock.saving():
                _store(checkpoint, step + 1, spent_s, run, named, optimiser, averages, durable=is_sure)
    model.eval()
    with torch.no_grad():
        for name, average in averages.items():
            named[name].copy_(average)
    return time.monotonic() - began


def _store(
    path: Path,
    done: int,
    spent_s: float,
    settings: Mapping[str, object],
    named: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    averages: dict[str, Tensor],
    *,
    durable: bool,
) -> None:
    """Writes the run's whole state, so that a kill at any moment leaves a complete file."""
    tensors = {f"weight/{n}": p.detach() for n, p in named.items()}
    tensors |= {f"average/{n}": a for n, a in averages.items()}
    for name, parameter in named.items():
        for key, value in optimiser.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = json.dumps({"steps_done": done, "seconds": round(spent_s, 1), "run": settings})
    save_tensors(path, tensors, {"run": facts}, durable=durable)


def _restore(
    path: Path,
    settings: Mapping[str, object],
    named: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    averages: dict[str, Tensor],
) -> tuple[int, float]:
    """Puts a stored state back; says how many steps are done and how many seconds they took."""
    try:
        stored, facts = load_tensors(path)
    except CheckpointError as error:
        raise StoreError(f"{path} is damaged: {error} Delete it to start afresh.") from None
    run = json.loads(facts.get("run", "{}"))
    was = run.get("run", {})
    differ = [k for k in settings if was.get(k) != settings[k]]
    missing = [n for n in named if f"weight/{n}" not in stored]
    if differ or missing:
        what = ", ".join(differ) or f"the weights {missing[:3]}"
        raise StoreError(
            f"{path} is of another run: {what} differ. Delete it to start afresh, or choose another folder."
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(stored[f"weight/{name}"])
            if averages:
                averages[name].copy_(stored[f"average/{name}"])
            # A parameter that took no part in the loss has no state.
            for key in [k for k in ("exp_avg", "exp_avg_sq", "step") if f"{k}/{name}" in stored]:
                where = "cpu" if key == "step" else parameter.device
                optimiser.state[parameter][key] = stored[f"{key}/{name}"].to(where)
    return int(run["steps_done"]), float(run.get("seconds", 0.0))
