"""Activations and gradients on disk: safetensors shards and a manifest, written whole or not at all.

    with Writer(folder, {"vision.blocks.3.hook_resid_post": Column((128,))}, about={...}) as writer:
        for images in batches[writer.appends :]:          # What is stored already is not made again.
            writer.append({"vision.blocks.3.hook_resid_post": rows}, items=len(images))
    for batch in Store(folder).batches(4096, seed=0): ...

A folder holds `manifest.json` and, for each shard, one safetensors file a column. A shard closes
between two appends, when it is large enough. From time to time the rows of the open one are made safe
too. What came after that is lost when the process dies, and made again: the store ends up the same, byte
for byte. Every file has a checksum in the manifest, which is taken when the file is first read.

`provenance` says what work is made of, and `work_folder` keeps it beside work that is no store.
"""

from __future__ import annotations

import json
import math
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm_adapters._errors import CheckpointError, StoreError
from mm_adapters.checkpoints.checks import check_safetensors
from mm_adapters.storage.documents import read_document, read_mapping, read_text, write_document
from mm_adapters.storage.files import CODES, DTYPES, Mapped, atomic_write
from mm_adapters.storage.fingerprint import of_data, of_module, of_tensors
from mm_adapters.storage.kept_calls import kept_calls
from mm_adapters.storage.manifest import Column, file_name, read_manifest
from mm_adapters.storage.provenance import check_same_work, exclusive, provenance, work_folder
from mm_adapters.storage.save_clock import SaveClock
from mm_adapters.storage.tensor_files import load_tensors, save_tensors
from mm_adapters.storage.writer import Writer

__all__ = [
    "Column",
    "SaveClock",
    "Store",
    "Writer",
    "atomic_write",
    "check_same_work",
    "exclusive",
    "kept_calls",
    "load_tensors",
    "of_data",
    "of_module",
    "of_tensors",
    "provenance",
    "read_document",
    "read_mapping",
    "read_text",
    "save_tensors",
    "work_folder",
    "write_document",
]


class Store:
    """Reads a store: its rows in order, or shuffled batches, in memory that does not grow with it.

    `partial=True` also opens one whose writer was stopped, with the rows of its closed shards.

    Raises: StoreError if it is no store, not complete, or a file of it is cut; when a file is first read
    that is damaged, or that changed since.
    """

    def __init__(self, folder: str | Path, *, partial: bool = False) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if not manifest["complete"] and not partial:
            raise StoreError(
                f"{self.folder} is not complete: its writer stopped after {len(manifest['shards'])} shards. "
                "Run what makes it again, or open it with partial=True."
            )
        self.about: dict[str, Any] = manifest["about"]
        self.columns = {
            entry["name"]: Column(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            for entry in manifest["columns"]
        }
        self.n_items: int = sum(s["items"] for s in manifest["shards"])
        self._ends = list(accumulate(s["rows"] for s in manifest["shards"]))
        self._shards: list[dict[str, Mapped]] = []
        for i, shard in enumerate(manifest["shards"]):
            files: dict[str, Mapped] = {}
            for k, (name, column) in enumerate(self.columns.items()):
                path = self.folder / file_name(i, k)
                files[name] = self._map(path, name, column, shard["rows"], shard["crc32"][k])
            self._shards.append(files)
        self.content = f"{zlib.crc32(json.dumps(manifest['shards']).encode()):08x}"

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows(
        self, start: int = 0, stop: int | None = None, columns: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Rows `start` to `stop` of each column; a view of the disk where one shard has them all."""
        names = self._names(columns)
        stop = len(self) if stop is None else min(stop, len(self))
        if not 0 <= start <= stop:
            raise StoreError(f"There are no rows {start} to {stop}: {self.folder} has {len(self)}.")
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        at, shard = start, bisect_right(self._ends, start)
        while at < stop:
            first = self._ends[shard - 1] if shard else 0
            end = min(stop, self._ends[shard])
            for name in names:
                parts[name].append(self._shards[shard][name].tensor[at - first : end - first])
            at, shard = end, shard + 1
        return {name: _joined(pieces, self.columns[name]) for name, pieces in parts.items()}

    def views(self, size: int, columns: Sequence[str] | None = None) -> Iterator[dict[str, Tensor]]:
        """Every row in order, at most `size` at a time and never of two shards: nothing is copied."""
        if size < 1:
            raise StoreError(f"A view has at least one row, not {size}.")
        for first, end in zip([0, *self._ends], self._ends, strict=False):
            for start in range(first, end, size):
                yield self.rows(start, min(start + size, end), columns)

    def batches(
        self,
        size: int,
        *,
        seed: int | None = 0,
        epoch: int = 0,
        start: int = 0,
        columns: Sequence[str] | None = None,
        buffer_rows: int = 65_536,
        block_rows: int = 256,
        drop_last: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """Every row once, in batches, shuffled by (`seed`, `epoch`); in order if `seed` is None.

        Blocks of `block_rows` neighbours are drawn from all over the store into a window of
        `buffer_rows`, whose rows are mixed: what is read from the disk lies together. Within a batch,
        rows stand in the store's order. `start` is the number of the first batch wanted; what comes
        before is not read.
        """
        names = self._names(columns)
        if size < 1 or buffer_rows < 1 or block_rows < 1 or start < 0:
            raise StoreError(
                f"Batches, buffers and blocks have at least one row, and the first batch is 0: size={size}, "
                f"buffer_rows={buffer_rows}, block_rows={block_rows}, start={start}."
            )
        if seed is None:
            for at in range(start * size, len(self) - (size - 1 if drop_last else 0), size):
                yield self.rows(at, at + size, names)
            return
        left = np.empty(0, np.int64)
        for window in self._windows(seed, epoch, start * size, buffer_rows, block_rows, names):
            order = np.concatenate([left, window])
            whole = len(order) - len(order) % size
            for at in range(0, whole, size):
                yield self._gathered(order[at : at + size], names)
            left = order[whole:]
        if len(left) and not drop_last:
            yield self._gathered(left, names)

    def _windows(
        self, seed: int, epoch: int, skip: int, buffer_rows: int, block_rows: int, names: list[str]
    ) -> Iterator[NDArray[np.int64]]:
        """The numbers of the shuffled rows, a window at a time, without the first `skip`."""
        n_blocks = math.ceil(len(self) / block_rows)
        order = torch.randperm(n_blocks, generator=_generator(seed, epoch, -1)).numpy()
        inside = np.arange(block_rows)
        per_window = max(1, buffer_rows // block_rows)
        for number in range(math.ceil(n_blocks / per_window)):
            blocks = order[number * per_window : (number + 1) * per_window]
            rows = (blocks[:, None] * block_rows + inside).ravel()
            if n_blocks - 1 in blocks:  # Which may be shorter.
                rows = rows[rows < len(self)]
            if skip >= len(rows):
                skip -= len(rows)
                continue
            for block in blocks.tolist():
                self._expect(block * block_rows, (block + 1) * block_rows, names)
            mixed = torch.randperm(len(rows), generator=_generator(seed, epoch, number)).numpy()
            yield rows[mixed[skip:]]
            skip = 0

    def _gathered(self, rows: NDArray[np.int64], names: list[str]) -> dict[str, Tensor]:
        """These rows, in the store's order, so that memory is walked one way."""
        rows = np.sort(rows)
        out = {n: _empty(len(rows), self.columns[n]) for n in names}
        at = 0
        for shard, end in enumerate(np.searchsorted(rows, self._ends).tolist()):
            if end == at:
                continue
            local = torch.from_numpy(rows[at:end] - (self._ends[shard - 1] if shard else 0))
            for name in names:
                torch.index_select(self._shards[shard][name].tensor, 0, local, out=out[name][at:end])
            at = end
        return out

    def _expect(self, start: int, stop: int, names: list[str]) -> None:
        """Tells the system that these rows are wanted soon."""
        shard = bisect_right(self._ends, start)
        first = self._ends[shard - 1] if shard else 0
        for name in names:
            self._shards[shard][name].expect(start - first, stop - first)

    def _names(self, columns: Sequence[str] | None) -> list[str]:
        names = list(self.columns) if columns is None else list(columns)
        unknown = [n for n in names if n not in self.columns]
        if unknown or not names:
            raise StoreError(f"{self.folder} has no column {unknown}; it has {list(self.columns)}.")
        return names

    def _map(self, path: Path, name: str, column: Column, n_rows: int, crc32: int) -> Mapped:
        try:
            header = check_safetensors(path)
        except CheckpointError as error:
            raise StoreError(f"{error} Or delete {self.folder} and make it again.") from None
        shape = [n_rows, *column.shape]
        entry = header.get(name, {})
        if entry.get("shape") != shape or entry.get("dtype") != CODES[column.dtype]:
            raise StoreError(
                f"{path} holds {header} and the manifest says {name!r}, {column.dtype}, {shape}. It is of "
                f"another store; delete {self.folder} and make it again."
            )
        return Mapped(path, tuple(shape), column.dtype, crc32)


def _empty(n_rows: int, column: Column) -> Tensor:
    """Rows to fill. NumPy asks the system for huge pages, where a batch costs few faults; torch does not."""
    if column.dtype == torch.bfloat16:
        return _empty(n_rows, Column(column.shape, torch.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.empty((n_rows, *column.shape), str(column.dtype).removeprefix("torch.")))


def _joined(parts: list[Tensor], column: Column) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.empty((0, *column.shape), dtype=column.dtype)


def _generator(*numbers: int) -> torch.Generator:
    """A generator for these numbers; other numbers give another."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(seed)
