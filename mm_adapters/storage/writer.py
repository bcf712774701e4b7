"""Writing a store, so that what was promised survives whatever happens to the process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mm_adapters._errors import CheckpointError, StoreError
from mm_adapters.storage.documents import read_document, write_document
from mm_adapters.storage.files import GrowingFile, lock, sync_folder
from mm_adapters.storage.manifest import (
    MANIFEST,
    OPEN,
    Column,
    check_same,
    file_name,
    new_manifest,
    read_manifest,
    write_manifest,
)
from mm_adapters.storage.save_clock import SaveClock

_SHARD_BYTES = 128 * 2**20


class Writer:
    """Writes a store, or goes on with one. Within `with`, an error leaves what is safely stored.

    `about` says what the rows are (model, site, data, roles, steps, seed, projection ...), in JSON's
    types; a store made with other columns or other words about it is not gone on with.

    `appends`, `items` and `rows` count what is safely stored: where a resumed run begins. That is brought
    up to date when a shard closes, when time has passed (saving takes a few hundredths of it), and when
    the block ends with an error.

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
        self._kept: dict[str, Any] | None = None
        self._clock = SaveClock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.folder)
        except BlockingIOError:
            raise StoreError(f"Another process is writing {self.folder}. Wait for it.") from None
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be a store: {error.strerror or error}.") from None
        try:
            self._resume()
        except OSError as error:
            self._unlock()
            raise error if isinstance(error, StoreError) else self._failed(error) from error
        except BaseException:
            self._unlock()
            raise

    @property
    def appends(self) -> int:
        """How many appends are safely stored."""
        return self._stored("appends")

    @property
    def items(self) -> int:
        """How many source items (images, prompts) are safely stored."""
        return self._stored("items")

    @property
    def rows(self) -> int:
        """How many rows are safely stored."""
        return self._stored("rows")

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
                self._files = self._open_shard()
            for file, rows in zip(self._files, ready, strict=True):
                file.write(rows)
            self._count(1, items)
            size = sum(c.row_bytes for c in self.columns.values()) * self._files[0].rows
            if size >= self._manifest["shard_bytes"]:
                with self._clock.saving():
                    self._close_shard()
            elif self._clock.is_due():
                with self._clock.saving():
                    self._keep()
        except OSError as error:
            self._leave()
            raise self._failed(error) from error

    def close(self) -> None:
        """Stores what is left and marks the store complete."""
        if self.complete:
            return self._unlock()
        try:
            if not self._files and self._kept:
                self._files = self._open_shard()
            if self._files:
                self._close_shard()
            self._manifest["complete"] = True
            write_manifest(self.folder, self._manifest)
        except OSError as error:
            self._manifest["complete"] = False
            self._leave()
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
        if self._files:
            with suppress(OSError):  # What was kept before still is.
                self._keep()
        self._leave()
        self._unlock()

    def _stored(self, what: str) -> int:
        safe = [*self._manifest["shards"], *([self._kept] if self._kept else [])]
        return sum(part[what] for part in safe)

    def _resume(self) -> None:
        path = self.folder / MANIFEST
        if path.exists():
            stored = read_manifest(self.folder)
            check_same(self.folder, stored, self._manifest)
            self._manifest = stored
        else:
            ours = (".tmp", ".safetensors")
            strangers = [p.name for p in self.folder.iterdir() if p.suffix not in ours and p.name != OPEN]
            if strangers:
                raise StoreError(
                    f"{self.folder} holds other files ({', '.join(strangers[:3])}). Choose a new folder."
                )
            write_manifest(self.folder, self._manifest)
        n_shards = len(self._manifest["shards"])
        counted = {p.name for i in range(n_shards) for p in self._paths(i)}
        self._kept = None if self.complete else self._read_kept(n_shards)
        if self._kept:
            self._finish_renaming(n_shards)
            try:
                for file in self._open_shard():
                    file.leave()
            except OSError:  # Lost or damaged: its rows are made again.
                self._kept = None
            else:
                counted |= {p.with_suffix(".tmp").name for p in self._paths(n_shards)}
        if not self._kept:
            (self.folder / OPEN).unlink(missing_ok=True)
        for left in (*self.folder.glob("*.tmp"), *self.folder.glob("*.safetensors")):
            if left.name not in counted:  # Of a run that died before the manifest counted them.
                left.unlink()

    def _read_kept(self, shard: int) -> dict[str, Any] | None:
        """What was kept of the open shard; a note that is damaged, or of another one, is as good as none."""
        try:
            kept = read_document(self.folder / OPEN)
        except CheckpointError:
            return None
        return kept["open"] if kept.get("shard") == shard else None

    def _finish_renaming(self, shard: int) -> None:
        """Files of the open shard that got their name before the manifest counted them lose it again."""
        for path in self._paths(shard):
            if path.exists():
                os.replace(path, path.with_suffix(".tmp"))

    def _paths(self, shard: int) -> list[Path]:
        return [self.folder / file_name(shard, i) for i in range(len(self.columns))]

    def _open_shard(self) -> list[GrowingFile]:
        """A new shard's files, or those of the open one, up to what is safely stored of them."""
        kept = self._kept
        self._pending = dict(kept) if kept else {"rows": 0, "appends": 0, "items": 0, "crc32": []}
        sums = kept["crc32"] if kept else [0] * len(self.columns)
        paths = self._paths(len(self._manifest["shards"]))
        files: list[GrowingFile] = []
        try:
            for path, (name, column), crc32 in zip(paths, self.columns.items(), sums, strict=True):
                rows = kept["rows"] if kept else 0
                files.append(GrowingFile(path, name, column.shape, column.dtype, rows=rows, crc32=crc32))
        except BaseException:
            for file in files:
                file.leave()
            raise
        return files

    def _count(self, appends: int, items: int) -> None:
        """What the open shard has, after an append that reached all of its files."""
        self._pending = {
            "rows": self._files[0].rows,
            "appends": self._pending["appends"] + appends,
            "items": self._pending["items"] + items,
            "crc32": [file.crc32 for file in self._files],
        }

    def _keep(self) -> None:
        """Keeps the open shard as it is, without closing it: shards are the same with and without.

        It outlives the process. If the power fails it may not, and the checksums say so.
        """
        for file in self._files:
            file.flush()
        note = {"shard": len(self._manifest["shards"]), "open": self._pending}
        write_document(self.folder / OPEN, note, durable=False)
        self._kept = self._pending

    def _close_shard(self) -> None:
        for file in self._files:
            file.close()
        sync_folder(self.folder)
        shards = [*self._manifest["shards"], self._pending]
        write_manifest(self.folder, self._manifest | {"shards": shards})
        self._manifest["shards"] = shards
        self._files, self._kept = [], None
        (self.folder / OPEN).unlink(missing_ok=True)

    def _leave(self) -> None:
        for file in self._files:
            file.leave()
        self._files = []

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
