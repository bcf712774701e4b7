"""Scores by unlearning: what else does a model forget when it is made to forget one picture?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from methods_multimodal.core.running import State, run_steps
from methods_multimodal.data_attribution.features import examples_fingerprint, made_of
from methods_multimodal.data_attribution.task import Batch, Examples, Task, batch_of, n_examples
from mm_adapters import InputError
from mm_adapters.store import of_data, of_tensors, provenance, work_folder

Weights = Mapping[str, Tensor]

_PAPER_STEP, _PAPER_EXAMPLES = 0.01, 118_000  # Its model of MSCOCO.


def unlearning_scores(
    task: Task,
    examples: Examples,
    queries: Batch,
    *,
    step: float | None = None,
    fisher: Weights | None = None,
    damping: float = 1e-3,
    folder: str | Path | None = None,
    batch_size: int = 64,
    max_rows: int = 256,
) -> Float[Tensor, "query example"]:
    """How much the loss of each training example rises when each query is unlearned by one step.

    A query's loss is climbed, weight by weight divided by the empirical Fisher information of the
    training set (a Newton step that keeps what the other examples hold), over its number of examples:
    w + step * gradient / (N * Fisher). Positive is helpful. The task's first measure is the loss, and its
    parameters are what moves: the paper's are the cross-attention's keys and values
    (`parameters="cross_attention_kv"`). `damping` is added to the Fisher, in shares of its mean.

    `step` over N is the paper's unless it is given: 0.01 N / 118,000. The paper's step itself, 0.01, breaks
    a model that knows few examples by heart (a small Fisher): every loss rises, and scores say how easily,
    not for which query. A good step is one where half of it halves scores.
    With a `folder`, work is written down as it is done, and a run that was killed goes on.

    Source: Wang et al. 2024, arXiv 2406.09408, section 3.
    Raises: InputError for a step or damping that is not positive; StoreError for a folder of another run.
    """
    step = _PAPER_STEP * n_examples(examples) / _PAPER_EXAMPLES if step is None else step
    if step <= 0 or damping <= 0:
        raise InputError(f"Step and damping are positive, not {step} and {damping}.")
    own_fisher = None if fisher is None else of_tensors(fisher)
    work: Any = nullcontext()
    if folder is not None:
        facts = made_of(task) | {"data": examples_fingerprint(examples), "queries": of_data([dict(queries)])}
        settings: dict[str, Any] = {
            "step": step,
            "damping": damping,
            "batch_size": batch_size,
            "max_rows": max_rows,
        }
        work = work_folder(folder, provenance(job="unlearning", fisher=own_fisher, **settings) | facts)
    with work as done:
        return _scores(task, examples, queries, step, fisher, damping, done, batch_size, max_rows)


def _scores(
    task: Task,
    examples: Examples,
    queries: Batch,
    step: float,
    fisher: Weights | None,
    damping: float,
    done: Path | None,
    batch_size: int,
    max_rows: int,
) -> Float[Tensor, "query example"]:
    n, n_queries = n_examples(examples), len(queries["index"])
    weights, constants, measure = task.weights(), task.constants(), task.measures[0]
    fisher = fisher or fisher_diagonal(
        task,
        examples,
        batch_size=max(1, max_rows // task.n_draws),  # One call each: what a kill costs.
        max_rows=max_rows,
        file=done and done / "fisher.safetensors",
    )
    mean = torch.cat([v.flatten() for v in fisher.values()]).mean()
    scale = {name: 1 / (n * (value + damping * mean)) for name, value in fisher.items()}
    starts = range(0, n, batch_size)

    def measured(state: Weights | None, name: str) -> Tensor:
        """The measure of each example, under these weights."""
        tensors = None if state is None else {**constants, **state}

        def one_batch(sofar: State, i: int) -> State:
            part = batch_of(examples, starts[i], starts[i] + batch_size)
            with torch.no_grad():
                rows = task.per_example(part, tensors, max_rows=max_rows)[measure]
            return {"rows": torch.cat([sofar["rows"], rows])}

        none = next(iter(weights.values())).new_zeros(0)
        return run_steps(len(starts), one_batch, {"rows": none}, done and done / f"{name}.safetensors")[
            "rows"
        ]

    def loss(state: Weights, batch: Batch) -> Tensor:
        return task.per_example(batch, {**constants, **state}, max_rows=max_rows)[measure].sum()

    before, rows = measured(None, "before"), []
    for query in tqdm(range(n_queries), desc="unlearning", unit="query", disable=None):
        up = grad(loss)(weights, {name: value[query : query + 1] for name, value in queries.items()})
        moved = {name: value + step * scale[name] * up[name] for name, value in weights.items()}
        rows.append(measured(moved, f"query {query}") - before)
    return torch.stack(rows)


def fisher_diagonal(
    task: Task, examples: Examples, *, batch_size: int = 32, max_rows: int = 32, file: Path | None = None
) -> dict[str, Tensor]:
    """The empirical Fisher information's diagonal: mean squared gradients of single draws, by parameter.

    Every draw (timestep and noise) of every example is one gradient. In `file`, of a folder that is this
    run's own, the sum is written down as it grows.
    """
    weights, constants, measure = task.weights(), task.constants(), task.measures[0]
    call = task.call

    def loss(state: Weights, row: Batch) -> Tensor:
        alone = {name: value[None] for name, value in row.items()}
        return task.values(call(state, constants), alone)[measure].sum()

    each = vmap(grad(loss), in_dims=(None, 0))
    parts = range(0, n_examples(examples), batch_size)

    def one_batch(sofar: State, i: int) -> State:
        batch = batch_of(examples, parts[i], parts[i] + batch_size)
        rows = task.rows(batch, range(task.n_draws))
        size = len(next(iter(rows.values())))
        total = dict(sofar)
        for first in range(0, size, max_rows):
            part = {name: value[first : first + max_rows] for name, value in rows.items()}
            # Fused attention has no batching rule.
            with sdpa_kernel(SDPBackend.MATH):
                gradients = each(weights, part)
            for name, value in gradients.items():
                total[name] = total[name] + value.square().sum(0)
        bar.update()
        return total | {"": total[""] + size}  # No parameter has this name.

    start = {name: torch.zeros_like(value) for name, value in weights.items()} | {"": torch.zeros(())}
    with tqdm(total=len(parts), desc="Fisher information", unit="batch", disable=None) as bar:
        total = run_steps(len(parts), one_batch, start, file)
    return {name: value / float(total[""]) for name, value in total.items() if name}
