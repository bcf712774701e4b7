"""One training loop for every model of the zoo: a bar, checkpoints, and resuming after a kill.

A loss must be a pure function of the weights and the step's number. Then the weights, the
optimiser's state and the number of steps done are the whole state of a run, and a run that was
killed continues to exactly the result it would have had.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from mm_adapters._errors import StoreError

# The share of the time that writing checkpoints may take.
_SAVING = 0.03


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


@contextmanager
def mixed() -> Iterator[None]:
    """Matrix products and convolutions in bfloat16, everything else in float32."""
    with torch.autocast(device().type, torch.bfloat16), _FullAttention():
        yield


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
    run = {k: v for k, v in asdict(schedule).items() if k not in ("checkpoint_every", "stop_after")}
    run["seed"] = seed
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
    saving_s, saved_at = 0.0, time.monotonic()
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
        is_due = saving_s < _SAVING * (time.monotonic() - saved_at)
        if (step + 1) % schedule.checkpoint_every == 0 or step + 1 == last or is_due:
            before = time.monotonic()
            _store(checkpoint, step + 1, before - began, run, named, optimiser, averages)
            saved_at = time.monotonic()
            saving_s = saved_at - before
    model.eval()
    with torch.no_grad():
        for name, average in averages.items():
            named[name].copy_(average)
    return time.monotonic() - began


def _store(
    path: Path,
    done: int,
    spent_s: float,
    settings: dict[str, object],
    named: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    averages: dict[str, Tensor],
) -> None:
    """Writes the run's whole state, so that a kill at any moment leaves a complete file."""
    tensors = {f"weight/{n}": p.detach() for n, p in named.items()}
    tensors |= {f"average/{n}": a for n, a in averages.items()}
    for name, parameter in named.items():
        for key, value in optimiser.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    tensors = {k: v.contiguous().cpu() for k, v in tensors.items()}
    run = json.dumps({"steps_done": done, "seconds": round(spent_s, 1), "run": settings})
    save_file(tensors, partial, metadata={"run": run})
    os.replace(partial, path)


def _restore(
    path: Path,
    settings: dict[str, object],
    named: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    averages: dict[str, Tensor],
) -> tuple[int, float]:
    """Puts a stored state back; says how many steps are done and how many seconds they took."""
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} is damaged: {error}. Delete it to start afresh.") from None
    with opened as file, torch.no_grad():
        stored = set(file.keys())
        was = json.loads((file.metadata() or {}).get("run", "{}")).get("run", {})
        differ = [k for k in settings if was.get(k) != settings[k]]
        missing = [n for n in named if f"weight/{n}" not in stored]
        if differ or missing:
            what = ", ".join(differ) or f"the weights {missing[:3]}"
            raise StoreError(
                f"{path} is of another run: {what} differ. Delete it to start afresh, or choose another "
                "folder."
            )
        for name, parameter in named.items():
            parameter.copy_(file.get_tensor(f"weight/{name}"))
            if averages:
                averages[name].copy_(file.get_tensor(f"average/{name}"))
            # A parameter that took no part in the loss has no state.
            for key in [k for k in ("exp_avg", "exp_avg_sq", "step") if f"{k}/{name}" in stored]:
                where = "cpu" if key == "step" else parameter.device
                optimiser.state[parameter][key] = file.get_tensor(f"{key}/{name}").to(where)
        run = json.loads(file.metadata()["run"])
    return int(run["steps_done"]), float(run.get("seconds", 0.0))
