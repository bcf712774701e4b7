"""Scores by unlearning: what else does a model forget when it is made to forget one picture?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from methods_multimodal.core.files import write_text
from methods_multimodal.core.progress import fingerprint
from methods_multimodal.data_attribution.task import Batch, Examples, Task, batch_of, n_examples
from mm_adapters import InputError
from mm_adapters.store import atomic_write

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
    With a `folder`, each query is written as it is done, and a run that was killed goes on.

    Source: Wang et al. 2024, arXiv 2406.09408, section 3.
    Raises: InputError for a step or damping that is not positive, or a folder of another run.
    """
    n, n_queries = n_examples(examples), len(queries["index"])
    step = _PAPER_STEP * n / _PAPER_EXAMPLES if step is None else step
    if step <= 0 or damping <= 0:
        raise InputError(f"Step and damping are positive, not {step} and {damping}.")
    weights, constants, measure = task.weights(), task.constants(), task.measures[0]
    done = Path(folder) if folder is not None else None
    if done is not None:
        _claim(done, task, examples, queries, step, damping, weights)
    fisher = fisher or fisher_diagonal(task, examples, max_rows=max_rows)
    mean = torch.cat([v.flatten() for v in fisher.values()]).mean()
    scale = {name: 1 / (n * (value + damping * mean)) for name, value in fisher.items()}

    def measured(state: Weights | None) -> Tensor:
        tensors = None if state is None else {**constants, **state}
        with torch.no_grad():
            return torch.cat(
                [
                    task.per_example(part, tensors, max_rows=max_rows)[measure]
                    for part in _batches(examples, batch_size)
                ]
            )

    def loss(state: Weights, batch: Batch) -> Tensor:
        return task.per_example(batch, {**constants, **state}, max_rows=max_rows)[measure].sum()

    before, rows = measured(None), []
    for query in tqdm(range(n_queries), desc="unlearning", unit="query", disable=None):
        file = None if done is None else done / f"{query}.safetensors"
        if file is None or not file.is_file():
            up = grad(loss)(weights, {name: value[query : query + 1] for name, value in queries.items()})
            moved = {name: value + step * scale[name] * up[name] for name, value in weights.items()}
            rows.append(measured(moved) - before)
            if file is not None:
                with atomic_write(file, keep_suffix=True) as part:
                    save_file({"scores": rows[-1].cpu()}, part)
        else:
            rows.append(load_file(file)["scores"].to(before))
    return torch.stack(rows)


def fisher_diagonal(
    task: Task, examples: Examples, *, batch_size: int = 32, max_rows: int = 32
) -> dict[str, Tensor]:
    """The empirical Fisher information's diagonal: mean squared gradients of single draws, by parameter.

    Every draw (timestep and noise) of every example is one gradient.
    """
    weights, constants, measure = task.weights(), task.constants(), task.measures[0]
    call = task.call

    def loss(state: Weights, row: Batch) -> Tensor:
        alone = {name: value[None] for name, value in row.items()}
        return task.values(call(state, constants), alone)[measure].sum()

    total = {name: torch.zeros_like(value) for name, value in weights.items()}
    each, count = vmap(grad(loss), in_dims=(None, 0)), 0
    parts = list(range(0, n_examples(examples), batch_size))
    for start in tqdm(parts, desc="Fisher information", unit="batch", disable=None):
        batch = batch_of(examples, start, start + batch_size)
        rows = task.rows(batch, range(task.n_draws))
        size = len(next(iter(rows.values())))
        for first in range(0, size, max_rows):
            part = {name: value[first : first + max_rows] for name, value in rows.items()}
            # Fused attention has no batching rule.
            with sdpa_kernel(SDPBackend.MATH):
                gradients = each(weights, part)
            for name, value in gradients.items():
                total[name] += value.square().sum(0)
        count += size
    return {name: value / count for name, value in total.items()}


def _batches(examples: Examples, size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, n_examples(examples), size):
        yield batch_of(examples, start, start + size)


def _claim(
    folder: Path,
    task: Task,
    examples: Examples,
    queries: Batch,
    step: float,
    damping: float,
    weights: Weights,
) -> None:
    """Marks a folder as this run's. Raises: InputError if it is another's."""
    ends = [batch_of(examples, 0, 1), batch_of(examples, n_examples(examples) - 1, n_examples(examples))]
    mark = fingerprint(
        about=repr(sorted(task.about.items())),
        n=n_examples(examples),
        step=step,
        damping=damping,
        data=[v for end in ends for v in end.values()],
        queries=list(queries.values()),
        weights=list(weights.values()),
        names=list(weights),
    )
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "run.txt"
    if note.is_file() and note.read_text() != mark:
        raise InputError(
            f"{folder} holds another run's scores (other model, queries or settings). Pass another folder, "
            "or delete this one."
        )
    write_text(note, mark)
