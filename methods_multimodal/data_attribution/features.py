"""Gradient features of training examples on disk, and of queries in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from methods_multimodal.core.record import Record
from methods_multimodal.data_attribution._featurise import Draws, Featuriser
from methods_multimodal.data_attribution.gradients import Mode
from methods_multimodal.data_attribution.projection import Projection
from methods_multimodal.data_attribution.task import Examples, Task, batch_of, n_examples
from mm_adapters import InputError, StoreError
from mm_adapters.store import Column, Store, Writer, load_tensors, of_data, of_module, of_tensors, provenance

Checkpoint = Mapping[str, Tensor] | str | PathLike[str]

_SHARD_BYTES = 16 * 2**20
# More than this share of a batch's numbers lost as zeros is too coarse a dtype.
_LOST = 0.01


@dataclass(frozen=True)
class Features(Record):
    """Features of queries: `columns` as in the store, [query, feature]; `about`, as JSON text."""

    columns: dict[str, Tensor]
    about: str


def featurise(
    task: Task,
    examples: Examples,
    folder: str | Path,
    *,
    projection: Projection | None = None,
    checkpoints: Sequence[Checkpoint] | None = None,
    draws: Draws = "mean",
    mode: Mode = "auto",
    batch_size: int = 8,
    max_rows: int = 128,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = _SHARD_BYTES,
    progress: bool = True,
) -> Store:
    """A store of the examples' gradient features, one row each, in their order.

    For each measure and checkpoint it has a column "MEASURE@K" [feature] and "value.MEASURE@K" [];
    "index" is the example's number. `checkpoints` are state dicts or safetensors files (None: the
    module's weights). `draws` averages the gradients at all timesteps ("mean"), or each scaled to
    length one ("unit", Diffusion-ReTrac). At most `max_rows` rows (examples x draws) run at once.
    Killed and called again it goes on; the store ends up the same, byte for byte.

    Raises: InputError before any run for what does not fit, and for a gradient that is not finite;
    StoreError if the folder holds something else (another model, projection, seed, data), or is damaged.
    """
    projection = projection or Projection()
    maker = _maker(task, examples, projection, draws, mode, max_rows)
    n, points = n_examples(examples), [None] if checkpoints is None else list(checkpoints)
    about = _about(task, maker, projection, draws, points)
    about |= {"data": examples_fingerprint(examples), "n_examples": n, "batch_size": batch_size}
    names = [f"{m}@{k}" for k in range(len(points)) for m in task.measures]
    columns = {"index": Column((), torch.int64)}
    columns |= {name: Column((maker.dim,), dtype) for name in names}
    columns |= {f"value.{name}": Column(()) for name in names}
    with ExitStack() as stack:
        writer = stack.enter_context(Writer(folder, columns, about, shard_bytes=shard_bytes))
        if writer.appends:
            Store(folder, partial=True)  # A damaged shard is found now, not after the last one is made.
        if not writer.complete:
            maker.load(_state(points[0]))
            bar = stack.enter_context(
                tqdm(
                    total=n,
                    initial=writer.items,
                    desc="gradients",
                    unit="example",
                    disable=None if progress else True,
                )
            )
            for start in range(writer.appends * batch_size, n, batch_size):
                batch = batch_of(examples, start, start + batch_size)
                row: dict[str, Tensor] = {"index": batch["index"].to(torch.int64)}
                for k, point in enumerate(points):
                    if len(points) > 1:
                        maker.load(_state(point))
                    features, values = maker(batch, k)
                    row |= {f"{m}@{k}": v for m, v in features.items()}
                    row |= {f"value.{m}@{k}": v for m, v in values.items()}
                _check_kept(row, names, dtype)
                writer.append(row, items=len(batch["index"]))
                bar.update(len(batch["index"]))
    return Store(folder)


def query_features(
    task: Task,
    examples: Examples,
    *,
    projection: Projection | None = None,
    checkpoints: Sequence[Checkpoint] | None = None,
    draws: Draws = "mean",
    mode: Mode = "auto",
    batch_size: int = 8,
    max_rows: int = 128,
) -> Features:
    """The same features of a few queries, in memory; to be scored against a store made the same way.

    Raises: InputError as `featurise` does.
    """
    projection = projection or Projection()
    maker = _maker(task, examples, projection, draws, mode, max_rows)
    points = [None] if checkpoints is None else list(checkpoints)
    parts: dict[str, list[Tensor]] = {}
    for k, point in enumerate(points):
        maker.load(_state(point))
        for start in range(0, n_examples(examples), batch_size):
            batch = batch_of(examples, start, start + batch_size)
            features, values = maker(batch, k)
            for measure in task.measures:
                parts.setdefault(f"{measure}@{k}", []).append(features[measure].cpu())
                parts.setdefault(f"value.{measure}@{k}", []).append(values[measure].cpu())
    about = _about(task, maker, projection, draws, points)
    return Features({name: torch.cat(features) for name, features in parts.items()}, json.dumps(about))


def check_match(store: Store, queries: Features, measure: str, query_measure: str) -> list[tuple[str, str]]:
    """The columns to compare, (store's, queries') for each checkpoint.

    Raises: StoreError if the two were made with other weights, parameters or projections, or lack a measure.
    """
    about = json.loads(queries.about)
    for key in ("weights", "parameters", "projection", "signs"):
        if store.about.get(key) != about.get(key):
            raise StoreError(
                f"{store.folder} was made with other {key} than the queries ({store.about.get(key)!r}, not "
                f"{about.get(key)!r}). Make the queries' features as the store's were made."
            )
    pairs = [(f"{measure}@{k}", f"{query_measure}@{k}") for k in range(len(about["weights"]))]
    for have, names in ((store.columns, [p[0] for p in pairs]), (queries.columns, [p[1] for p in pairs])):
        known = sorted({name.partition("@")[0] for name in have if "@" in name and "." not in name})
        missing = [name for name in names if name not in have]
        if missing:
            raise StoreError(
                f"There are no features of {missing[0].partition('@')[0]!r}; there are of {', '.join(known)}."
            )
    return pairs


def _maker(
    task: Task, examples: Examples, projection: Projection, draws: Draws, mode: Mode, max_rows: int
) -> Featuriser:
    # Always the first two: whichever way a killed run chose, the next one chooses too.
    return Featuriser(task, batch_of(examples, 0, 2), projection, draws=draws, mode=mode, max_rows=max_rows)


def _about(
    task: Task, maker: Featuriser, projection: Projection, draws: str, points: Sequence[Checkpoint | None]
) -> dict[str, Any]:
    # A dense matrix of signs was another one before its columns came in bytes.
    signs = {"signs": "in bytes"} if projection.kind == "rademacher" else {}
    each = [made_of(task, _state(p)) for p in points]
    return {
        **signs,
        **each[0],
        "format": provenance()["format"],
        "made_by": "methods_multimodal.data_attribution.featurise",
        "weights": [one["weights"] for one in each],
        "projection": projection.about(),
        "draws": draws,
        "mode": maker.gradients.mode,
        "blocks": [list(b) for b in maker.blocks],
    }


def _state(point: Checkpoint | None) -> Mapping[str, Tensor] | None:
    if isinstance(point, str | PathLike):
        if not Path(point).is_file():
            raise InputError(f"There is no checkpoint {point}.")
        return load_tensors(Path(point))[0]
    return point


def _check_kept(row: Mapping[str, Tensor], names: Sequence[str], dtype: torch.dtype) -> None:
    """Raises: InputError if the stored dtype turns small features into zeros."""
    if torch.finfo(dtype).smallest_normal <= torch.finfo(torch.float32).smallest_normal:
        return
    for name in names:
        value = row[name]
        lost = ((value != 0) & (value.to(dtype) == 0)).float().mean().item()
        if lost > _LOST:
            raise InputError(
                f"{lost:.0%} of the features {name!r} are too small for {dtype} (their root mean square is "
                f"{value.square().mean().sqrt().item():.1g}). Store them as torch.bfloat16 or torch.float32."
            )


def _items(examples: Examples) -> Iterator[Mapping[str, Any]]:
    """What the examples are, one after the other; all at once if they lie in memory."""
    if isinstance(examples, Mapping):
        yield dict(examples)
    else:
        yield from (dict(examples[i]) for i in range(len(examples)))


def made_of(task: Task, state: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """What a task's numbers depend on, in JSON's types: its own account, its weights, how it is built."""
    module = of_module(task.module)
    return {
        "task": dict(task.about),
        "weights": of_tensors({**task.constants(state), **task.weights(state)}),
        "parameters": of_data([list(task.parameters)]),
        "module": {key: module[key] for key in ("class", "layers", "config", "adapters")},
    }


def examples_fingerprint(examples: Examples) -> str:
    """A hash of all examples, by content."""
    return of_data(_items(examples))
