"""The loop of every causal method here: a picture, its goal, a control, and one picture for each part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.generators import generator
from methods_multimodal.core.kept import Kept
from methods_multimodal.core.running import State, run_steps
from methods_multimodal.cross_attention.cases import Case, Part, unused_words
from methods_multimodal.cross_attention.effects import Effects
from methods_multimodal.cross_attention.metrics import Metric, scores
from mm_adapters import InputError, Model, TokenLayout

# Draws the base, the goal, the control and the parts of these numbers, in this order.
DrawParts = Callable[[Sequence[int]], Float[Tensor, "row 3 height width"]]
_ENDS = 3  # The base, the goal and the control are drawn in every run.


def measure_parts(
    model: Model,
    cases: Sequence[Case],
    layouts: Sequence[TokenLayout],
    parts: Sequence[Part],
    metric: Metric,
    drawing_of: Callable[[int, str | None, torch.Generator], DrawParts],
    *,
    what: str,
    batch: int,
    seed: int,
    work: Kept | None = None,
) -> Effects:
    """The metric of every case's pictures.

    Args:
        model: what draws them.
        cases: the pictures; `layouts` are of their prompts.
        parts: what is intervened on, one part at a time.
        metric: takes pictures, gives a number each.
        drawing_of: of a case's number, another word of its prompt (None: it has none) and the generator
            that chose it, says how its pictures are drawn.
        what: the intervention's name.
        batch: rows of a run.
        seed: of the other words.
        work: where runs are written down as they are done, and their steps.

    Raises: InputError if there is no case or part, or a batch holds no part.
    """
    if not cases or not parts:
        raise InputError("There is nothing to trace: give at least one case and one part.")
    size = batch - _ENDS
    if size < 1:
        raise InputError(f"batch={batch}: a run holds a picture, its goal, its control and a part at least.")
    rng = generator(seed)
    chunks = [list(range(i, min(i + size, len(parts)))) for i in range(0, len(parts), size)]
    draws: list[DrawParts] = []
    for i, case in enumerate(cases):
        words = unused_words(layouts[i], [case.word]) if case.word else []
        which = int(torch.randint(max(len(words), 1), (), generator=rng))
        draws.append(drawing_of(i, words[which] if words else None, rng))

    def one_run(sofar: State, number: int) -> State:
        i, k = divmod(number, len(chunks))
        begin(f"run {number}")
        values = scores(metric, draws[i](chunks[k])).cpu()
        table, ends = sofar["table"].clone(), sofar["ends"].clone()
        table[chunks[k], i] = values[_ENDS:]
        if k == 0:
            ends[:, i] = values[:_ENDS]
        bar.update()
        return {"table": table, "ends": ends}

    start = {"table": torch.zeros(len(parts), len(cases)), "ends": torch.zeros(_ENDS, len(cases))}
    n_runs = len(cases) * len(chunks)
    work = work or Kept(None)
    bar = tqdm(total=n_runs, desc=what, unit="run", disable=None, leave=False)
    with bar, work.calls(model) as begin:
        done = run_steps(n_runs, one_run, start, work.inside("runs.safetensors"))
    table, ends = done["table"], done["ends"]
    return Effects(
        changed=table,
        base=ends[0],
        goal=ends[1],
        control=ends[2],
        layers=tuple(p.layers or () for p in parts),
        heads=tuple(p.heads or () for p in parts),
        steps=tuple(p.steps or () for p in parts),
        what=what,
        metric=getattr(metric, "__name__", "metric"),
    )
