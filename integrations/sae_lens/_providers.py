"""Endless batches for a trainer, whose position can be saved and gone back to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from integrations.sae_lens._sites import SAESite, Tokens
from integrations.sae_lens.collect import batches
from mm_adapters import InputError, Model
from mm_adapters.store import Store

Batch = dict[str, Tensor]


class Provider(Protocol):
    """Endless batches: for each column a tensor [row, width].

    `position` says, in JSON's types, which batch comes next; `go_to` goes back to one.
    """

    def __next__(self) -> Batch: ...
    def position(self) -> dict[str, int]: ...
    def go_to(self, position: Mapping[str, int]) -> None: ...


class FromStore:
    """Batches of a store, shuffled anew each epoch."""

    def __init__(self, store: Store, columns: Sequence[str], size: int, seed: int) -> None:
        if len(store) < size:
            raise InputError(
                f"{store.folder} has {len(store)} rows, less than one batch of {size}. Collect more, or "
                "train with smaller batches."
            )
        self._store, self._columns, self._size, self._seed = store, list(columns), size, seed
        self._per_epoch = len(store) // size
        self.go_to({"batch": 0})

    def __next__(self) -> Batch:
        batch = next(self._batches, None)
        if batch is None:
            self.go_to({"batch": self._at})
            batch = next(self._batches)
        self._at += 1
        return batch

    def position(self) -> dict[str, int]:
        return {"batch": self._at}

    def go_to(self, position: Mapping[str, int]) -> None:
        self._at = position["batch"]
        epoch, start = divmod(self._at, self._per_epoch)
        self._batches = self._store.batches(
            self._size, seed=self._seed, epoch=epoch, start=start, columns=self._columns, drop_last=True
        )


class FromModel:
    """Batches straight from a model: items in an order of the epoch, their rows mixed in a buffer."""

    def __init__(
        self,
        model: Model,
        sae_sites: Sequence[SAESite],
        items: Sequence[Any],
        size: int,
        seed: int,
        *,
        tokens: Tokens,
        steps: Sequence[int] | None,
        batch_size: int,
        inputs: Mapping[str, Any] | None,
        buffer_rows: int = 65_536,
    ) -> None:
        self._options = (model, sae_sites, items, tokens, steps, batch_size, inputs)
        self._names = [sae_site.name for sae_site in sae_sites]
        self._items, self._size, self._seed = items, size, seed
        self._buffer_rows = max(buffer_rows, size)
        self.go_to({"epoch": 0, "run": 0, "batch": 0})

    def __next__(self) -> Batch:
        while not self._ready:
            self._fill()
        self._batch += 1
        return self._ready.pop(0)

    def position(self) -> dict[str, int]:
        return {"epoch": self._epoch, "run": self._run, "batch": self._batch}

    def go_to(self, position: Mapping[str, int]) -> None:
        # `run` is where the buffer began; the batches it gave are made again and skipped.
        self._epoch, self._run, self._next_run = position["epoch"], position["run"], position["run"]
        self._ready: list[Batch] = []
        self._batch = 0
        if position["batch"]:
            self._fill()
            self._batch = position["batch"]
            self._ready = self._ready[self._batch :]

    def _fill(self) -> None:
        order = torch.randperm(len(self._items), generator=_seeded(self._seed, self._epoch)).tolist()
        model, sae_sites, items, tokens, steps, batch_size, inputs = self._options
        if self._next_run * batch_size >= len(order):
            self._epoch, self._next_run = self._epoch + 1, 0
            order = torch.randperm(len(self._items), generator=_seeded(self._seed, self._epoch)).tolist()
        self._run, self._batch = self._next_run, 0
        parts: list[Batch] = []
        n_rows = 0
        for rows in batches(
            model, sae_sites, items, tokens, steps, batch_size, inputs, self._next_run, order
        ):
            parts.append({name: rows[name].float() for name in self._names})
            n_rows += len(parts[-1][self._names[0]])
            self._next_run += 1
            if n_rows >= self._buffer_rows:
                break
        if n_rows < self._size and not self._run:
            raise InputError(
                f"{len(items)} items give {n_rows} rows, less than one batch of "
                f"{self._size}. Give more items, or train with smaller batches."
            )
        mixed = torch.randperm(n_rows, generator=_seeded(self._seed, self._epoch, self._run))
        columns = {name: torch.cat([part[name] for part in parts])[mixed] for name in self._names}
        self._ready = [
            {name: column[at : at + self._size] for name, column in columns.items()}
            for at in range(0, n_rows - self._size + 1, self._size)
        ]


class FromIterator:
    """Batches of the user's own iterator, looked at before they reach a trainer."""

    def __init__(self, source: Any, column: str, needed: int) -> None:
        if isinstance(source, Tensor | list | tuple) or not hasattr(source, "__next__"):
            raise InputError(
                f"A provider is an iterator of tensors [row, d_in] without end; a {type(source).__name__} is "
                "not. Wrap it: itertools.cycle(batches)."
            )
        self._source: Iterator[Any] = source
        self._column, self._needed = column, needed
        self._at = self._rows = 0

    def __next__(self) -> Batch:
        try:
            batch = next(self._source)
        except StopIteration:
            raise InputError(
                f"The provider ended after {self._rows} rows and training takes {self._needed}. It must not "
                "end: itertools.cycle(batches) begins again, or lower total_training_samples."
            ) from None
        if not isinstance(batch, Tensor):
            raise InputError(f"The provider gave a {type(batch).__name__}; it gives tensors [row, d_in].")
        if batch.ndim != 2:
            raise InputError(
                f"The provider gave a tensor of shape {tuple(batch.shape)}; it gives [row, d_in]. Flatten "
                "its positions: batch.flatten(0, -2)."
            )
        if not batch.is_floating_point():
            raise InputError(f"The provider gave {batch.dtype}; it gives float16, bfloat16 or float32.")
        self._at += 1
        self._rows += len(batch)
        return {self._column: batch}

    def position(self) -> dict[str, int]:
        return {"batch": self._at}

    def go_to(self, position: Mapping[str, int]) -> None:
        while self._at < position["batch"]:  # It can only be asked again.
            next(self)


def _seeded(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(seed)
