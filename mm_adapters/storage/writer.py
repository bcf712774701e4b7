"""Writing a store, so that what was promised survives whatever happens to the process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mm_adapters._errors import StoreError
from mm_adapters.storage.files import GrowingFile, lock, sync_folder, write_json
from mm_adapters.storage.manifest import (
    MANIFEST,
    Column,
    check_same,
    file_name,
    new_manifest,
    read_manifest,
)

_SHARD_BYTES = 128 * 2**20


class Writer:
    """Writes a store, or goes on with one. Within `with`, an error leaves what is safely stored.

    `about` says what the rows are (model, site, data, roles, steps, seed, projection ...), in JSON's
    types; a store made with other columns or other words about it is not gone on with.

    `appends`, `items` and `rows` count what is safely stored: where a resumed run begins.

    Raises: StoreError for other metadata, a store that is complete, or one another process writes.
    """

    def __init__(
        self,
        folder: str | Path,
        columns: Mapping[str, Column],
        about: Mapping[str, Any] | None = None,
        *,
        shard_bytes: int = _SHARD_BYTES,
    ) -> None:
        if not columns:
            raise StoreError("A store needs a column.")
        self.folder = Path(folder)
        self.columns = dict(columns)
        self._manifest = new_manifest(self.columns, dict(about or {}), shard_bytes)
        self._files: list[GrowingFile] = []
        self._open_appends = self._open_items = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock(self.folder)
        except BlockingIOError:
            raise StoreError(f"Another process is writing {self.folder}. Wait for it.") from None
        try:
            self._resume()
        except BaseException:
            self._unlock()
            raise

    @property
    def appends(self) -> int:
        """How many appends are safely stored."""
        return sum(s["appends"] for s in self._manifest["shards"])

    @property
    def items(self) -> int:
        """How many source items (images, prompts) are safely stored."""
        return sum(s["items"] for s in self._manifest["shards"])

    @property
    def rows(self) -> int:
        """How many rows are safely stored."""
        return sum(s["rows"] for s in self._manifest["shards"])

    @property
    def complete(self) -> bool:
        """Whether the store was closed; then nothing can be added."""
        return self._manifest["complete"]

    def append(self, batch: Mapping[str, Tensor], items: int = 1) -> None:
        """Adds rows: for each column a tensor [row, ...], all of the same length. Kept on disk only.

        Raises: StoreError if a column is missing or does not fit, or the disk is full.
        """
        if self.complete:
            raise StoreError(
                f"{self.folder} is complete: {self.rows} rows of {self.items} items. Write a new folder."
            )
        ready = self._checked(batch)
        try:
            if not self._files:
                self._files = self._new_shard()
            for file, rows in zip(self._files, ready, strict=True):
                file.write(rows)
            self._open_appends += 1
            self._open_items += items
            size = sum(c.row_bytes for c in self.columns.values()) * self._files[0].rows
            if size >= self._manifest["shard_bytes"]:
                self._close_shard()
        except OSError as error:
            self._discard()
            raise self._failed(error) from error

    def close(self) -> None:
        """Stores what is left and marks the store complete."""
        if self.complete:
            return self._unlock()
        try:
            if self._files:
                self._close_shard()
            self._manifest["complete"] = True
            write_json(self.folder / MANIFEST, self._manifest)
        except OSError as error:
            self._discard()
            raise self._failed(error) from error
        finally:
            self._unlock()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            return self.close()
        self._discard()
        self._unlock()

    def _resume(self) -> None:
        path = self.folder / MANIFEST
        if path.exists():
            stored = read_manifest(self.folder)
            check_same(self.folder, stored, self._manifest)
            self._manifest = stored
        else:
            strangers = [p.name for p in self.folder.iterdir() if p.suffix not in (".tmp", ".safetensors")]
            if strangers:
                raise StoreError(
                    f"{self.folder} holds other files ({', '.join(strangers[:3])}). Choose a new folder."
                )
            write_json(path, self._manifest)
        counted = {p.name for i in range(len(self._manifest["shards"])) for p in self._paths(i)}
        for left in (*self.folder.glob("*.tmp"), *self.folder.glob("*.safetensors")):
            if left.name not in counted:  # Of a run that died before the manifest counted them.
                left.unlink()

    def _paths(self, shard: int) -> list[Path]:
        return [self.folder / file_name(shard, i) for i in range(len(self.columns))]

    def _new_shard(self) -> list[GrowingFile]:
        shard = len(self._manifest["shards"])
        files: list[GrowingFile] = []
        for path, (name, column) in zip(self._paths(shard), self.columns.items(), strict=True):
            files.append(GrowingFile(path, name, column.shape, column.dtype))
        return files

    def _close_shard(self) -> None:
        for file in self._files:
            file.close()
        sync_folder(self.folder)
        counts = {"rows": self._files[0].rows, "appends": self._open_appends, "items": self._open_items}
        shards = [*self._manifest["shards"], counts]
        write_json(self.folder / MANIFEST, self._manifest | {"shards": shards})
        self._manifest["shards"] = shards
        self._files, self._open_appends, self._open_items = [], 0, 0

    def _discard(self) -> None:
        for file in self._files:
            file.discard()
        self._files, self._open_appends, self._open_items = [], 0, 0

    def _checked(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        if set(batch) != set(self.columns):
            raise StoreError(
                f"append was given the columns {sorted(batch)}; this store has {sorted(self.columns)}."
            )
        lengths = {name: len(value) for name, value in batch.items()}
        if len(set(lengths.values())) > 1:
            raise StoreError(f"append was given columns of unequal length: {lengths}.")
        return [_fitted(name, batch[name], column) for name, column in self.columns.items()]

    def _failed(self, error: OSError) -> StoreError:
        return StoreError(
            f"{self.folder} could not be written: {error.strerror or error}. {self.rows} rows of "
            f"{self.items} items are safely stored; make room and run again to go on from there."
        )

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _fitted(name: str, value: Tensor, column: Column) -> Tensor:
    """The rows as the column stores them."""
    if tuple(value.shape[1:]) != column.shape:
        raise StoreError(f"A row of {name!r} has the shape {column.shape}, not {tuple(value.shape[1:])}.")
    if value.dtype.is_floating_point != column.dtype.is_floating_point:
        raise StoreError(f"{name!r} is stored as {column.dtype} and was given {value.dtype}. Convert it.")
    value = value.detach()
    stored = value.to("cpu", column.dtype)
    if column.dtype.is_floating_point and torch.finfo(column.dtype).max < torch.finfo(value.dtype).max:
        if bool((stored.isinf() & ~value.cpu().isinf()).any()):
            largest = float(value.abs().max())
            raise StoreError(
                f"{name!r} has a value of {largest:.3g}, more than {column.dtype} holds. Store it as "
                "bfloat16 or float32."
            )
    elif not column.dtype.is_floating_point and not bool((stored == value.cpu()).all()):
        raise StoreError(f"{name!r} has values that {column.dtype} does not hold. Use a wider type.")
    return stored
