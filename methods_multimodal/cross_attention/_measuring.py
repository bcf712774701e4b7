"""The loop of every causal method here: a picture, its goal, and for each part a picture and its control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.kept import Kept
from methods_multimodal.core.running import State, run_steps
from methods_multimodal.cross_attention.cases import Case, Part
from methods_multimodal.cross_attention.effects import Effects
from methods_multimodal.cross_attention.metrics import Metric, scores
from mm_adapters import InputError, Model

_ENDS = 2  # The base and the goal are drawn in every run.
# Pictures that differ by less than half a step of a byte are the same picture.
SAME_PICTURE = 0.5 / 255


@dataclass(frozen=True)
class Drawing:
    """How a case's pictures are drawn.

    `draw` gives the base, the goal and the parts of these numbers, then each of these parts' control, in this
    order; without controls (`control` is empty) the parts are the last. `control` says what the control is.
    """

    draw: Callable[[Sequence[int]], Float[Tensor, "row 3 height width"]]
    control: str


def measure_parts(
    model: Model,
    cases: Sequence[Case],
    parts: Sequence[Part],
    metric: Metric,
    drawings: Sequence[Drawing],
    *,
    what: str,
    batch: int,
    whole: Sequence[bool] | None = None,
    work: Kept | None = None,
) -> Effects:
    """The metric of every case's pictures.

    Args:
        model: what draws them.
        cases: the pictures.
        parts: what is intervened on, one part at a time.
        metric: takes pictures, gives a number each.
        drawings: how each case is drawn.
        what: the intervention's name.
        batch: rows of a run.
        whole: which parts are everything, so that they may give the goal by construction.
        work: where runs are written down as they are done, and their steps.
    """
    whole = [False] * len(parts) if whole is None else whole
    size = parts_a_run(batch)
    controlled = [i for i, drawing in enumerate(drawings) if drawing.control]
    chunks = [list(range(i, min(i + size, len(parts)))) for i in range(0, len(parts), size)]

    def one_run(sofar: State, number: int) -> State:
        i, k = divmod(number, len(chunks))
        begin(f"run {number}")
        images, chunk = drawings[i].draw(chunks[k]), chunks[k]
        values = scores(metric, images).cpu()
        n = len(chunk)
        sofar = {name: table.clone() for name, table in sofar.items()}
        sofar["changed"][chunk, i] = values[_ENDS : _ENDS + n]
        if drawings[i].control:
            sofar["control"][chunk, controlled.index(i)] = values[_ENDS + n :]
        apart = (images[_ENDS : _ENDS + n] - images[1]).abs().flatten(1).amax(1)
        sofar["same"][chunk, i] = (apart < SAME_PICTURE).float().cpu()
        if k == 0:
            sofar["ends"][:, i] = values[:_ENDS]
        bar.update()
        return sofar

    shape = (len(parts), len(cases))
    start = {
        "changed": torch.zeros(shape),
        "control": torch.zeros(len(parts), len(controlled)),
        "same": torch.zeros(shape),
        "ends": torch.zeros(_ENDS, len(cases)),
    }
    n_runs = len(cases) * len(chunks)
    work = work or Kept(None)
    bar = tqdm(total=n_runs, desc=what, unit="run", disable=None, leave=False)
    with bar, work.calls(model) as begin:
        done = run_steps(n_runs, one_run, start, work.inside("runs.safetensors"))
    same = (done["same"] > 0).all(1).tolist()
    return Effects(
        changed=done["changed"],
        base=done["ends"][0],
        goal=done["ends"][1],
        control=done["control"],
        layers=tuple(p.layers or () for p in parts),
        heads=tuple(p.heads or () for p in parts),
        steps=tuple(p.steps or () for p in parts),
        what=what,
        metric=getattr(metric, "__name__", "metric"),
        control_of=tuple(drawing.control for drawing in drawings),
        by_construction=tuple(bool(a and b) for a, b in zip(whole, same, strict=True)),
    )


def parts_a_run(batch: int) -> int:
    """How many parts, each with its control, fit in a run.

    Raises: InputError if none does.
    """
    size = (batch - _ENDS) // 2
    if size < 1:
        raise InputError(
            f"batch={batch}: a run holds a picture, its goal, a part and its control: four at least."
        )
    return size


def check_work(cases: Sequence[Case], parts: Sequence[Part], batch: int) -> None:
    """Raises: InputError if there is no case or part, or a batch holds no part."""
    if not cases or not parts:
        raise InputError("There is nothing to trace: give at least one case and one part.")
    parts_a_run(batch)
