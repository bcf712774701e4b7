"""The files of a store: safetensors written as rows arrive, and a manifest that is never half there."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from mm_adapters._errors import CheckpointError, StoreError

DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGN = 64
_MOST_ROWS = 10**15
_READ = 2**20


class GrowingFile:
    """One safetensors file of one tensor, written as its rows arrive; `close` gives it its name.

    Until then the bytes are in a file with the suffix .tmp; `rows` and `crc32` of it are what to go on
    from.

    Raises: StoreError if it is to go on from rows that are not there, or not those that were written.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        rows: int = 0,
        crc32: int = 0,
    ) -> None:
        self.path = path
        self.rows, self.crc32 = rows, crc32
        self._name, self._shape, self._dtype = name, shape, dtype
        self._tmp = path.with_suffix(".tmp")
        # Spaces after the header are part of the format; these leave room for any number of rows.
        longest = 8 + len(self._header(_MOST_ROWS))
        self._start = math.ceil(longest / _ALIGN) * _ALIGN
        self._file: BinaryIO
        if rows:
            self._go_on(rows * math.prod(shape) * dtype.itemsize)
        else:
            self._file = self._tmp.open("wb")
            self._file.write(b"\0" * self._start)

    def write(self, rows: Tensor) -> None:
        """Adds rows; they have the right shape and dtype, and lie on the CPU."""
        raw = _bytes_of(rows)
        self._file.write(raw)
        self.crc32 = zlib.crc32(raw, self.crc32)
        self.rows += len(rows)

    def flush(self) -> None:
        """Hands the rows to the system, still without their name: they outlive the process."""
        self._file.flush()

    def close(self) -> None:
        """Writes the header, brings the bytes to the disk, and puts the file in its place."""
        header = self._header(self.rows)
        self._file.seek(0)
        self._file.write((self._start - 8).to_bytes(8, "little") + header.ljust(self._start - 8))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._tmp, self.path)

    def leave(self) -> None:
        """Closes the file as it is, under its name for the meantime."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _go_on(self, n_bytes: int) -> None:
        crc32 = 0
        self._file = self._tmp.open("r+b")
        self._file.seek(self._start)
        left = n_bytes
        while left and (part := self._file.read(min(left, _READ))):
            crc32, left = zlib.crc32(part, crc32), left - len(part)
        if left or crc32 != self.crc32:
            self._file.close()
            raise StoreError(f"{self._tmp} does not hold what was written to it.")
        self._file.seek(self._start + n_bytes)
        self._file.truncate()

    def _header(self, rows: int) -> bytes:
        n_bytes = rows * math.prod(self._shape) * self._dtype.itemsize
        entry = {"dtype": CODES[self._dtype], "shape": [rows, *self._shape], "data_offsets": [0, n_bytes]}
        return json.dumps({self._name: entry}, separators=(",", ":")).encode()


class Mapped:
    """The tensor of a file that `GrowingFile` wrote, memory-mapped; writing into it stays in memory.

    It is mapped when it is first read, and its checksum taken then; no file stays open. Each time it is
    read, that the file is still as it was is looked at: what is gone from a mapped file kills a process.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, crc32: int) -> None:
        self._path, self._shape, self._dtype, self._crc32 = path, shape, dtype, crc32
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._facts = self._now()
        self._tensor = None if math.prod(shape) else torch.empty(shape, dtype=dtype)
        self._start = 0

    @property
    def tensor(self) -> Tensor:
        """Raises: StoreError if the file is not what was stored, or changed since."""
        if self._tensor is None:
            self._tensor = self._mapped()
        elif self._now() != self._facts:
            raise StoreError(
                f"{self._path} was changed while its store was open. Open the store again; if it is damaged, "
                f"delete {self._path.parent} and make it again."
            )
        return self._tensor

    def expect(self, start: int, stop: int) -> None:
        """Asks the system to read these rows ahead, in one piece."""
        if hasattr(os, "posix_fadvise") and self._row_bytes:
            with contextlib.suppress(OSError):
                opened = os.open(self._path, os.O_RDONLY)
                try:
                    first, size = self._start + start * self._row_bytes, (stop - start) * self._row_bytes
                    os.posix_fadvise(opened, first, size, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(opened)

    def _mapped(self) -> Tensor:
        self._start, crc32 = _start_and_crc32(str(self._path), self._facts)
        if crc32 != self._crc32 or self._now() != self._facts:
            raise StoreError(
                f"{self._path} is damaged: its bytes are not those that were stored. Delete "
                f"{self._path.parent} and make it again."
            )
        size = self._facts[1]
        # Private: what is written into it stays in memory. It keeps no file open, as mmap does.
        raw = torch.from_file(str(self._path), shared=False, size=size, dtype=torch.uint8)
        return raw[self._start :].view(self._dtype).view(self._shape)

    def _now(self) -> tuple[int, ...]:
        try:
            facts = os.stat(self._path)
        except FileNotFoundError:
            return (0, -1)
        return (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


@lru_cache(maxsize=2**16)
def _start_and_crc32(path: str, facts: tuple[int, ...]) -> tuple[int, int]:
    """Where a file's numbers begin, and their checksum: taken once in a process while its facts stay."""
    crc32 = 0
    with open(path, "rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        opened.seek(start)
        while part := opened.read(_READ):
            crc32 = zlib.crc32(part, crc32)
    return start, crc32


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike[str], *, keep_suffix: bool = False, durable: bool = True
) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder at, which then takes its place as a whole.

    The name ends in ".tmp", or as `path` does if `keep_suffix`, for writers that read the format off it.

    A reader sees the old file or the new one; if the block raises, the old one stays. (An old folder is
    gone for the moment between its removal and the new one's renaming.) If not `durable`, that holds when
    the process dies, and not when the power fails; it takes a hundredth of the time.

    Raises: StoreError, with the system's reason, if it cannot be written.
    """
    target = Path(path)
    draft = target.with_name(f".part-{target.name}" if keep_suffix else f"{target.name}.tmp")
    try:
        _remove(draft)
        yield draft
        if durable:
            for file in [p for p in draft.rglob("*") if p.is_file()] if draft.is_dir() else [draft]:
                _sync(file)
        if draft.is_dir():
            _remove(target)
        os.replace(draft, target)
        if durable:
            sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(draft)
        is_own = isinstance(error, StoreError | CheckpointError)
        if isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.errno and not is_own):
            raise StoreError(
                f"{target} could not be written: {_reason(error)}. Make room, or choose another place."
            ) from error
        raise


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).strip()


def write_json(path: Path, value: Mapping[str, Any], *, durable: bool = True) -> None:
    """Replaces the file as a whole: a reader sees the old one or the new one."""
    with atomic_write(path, durable=durable) as draft:
        draft.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    with path.open("rb+") as opened:
        os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    with contextlib.suppress(OSError):  # Not every file system lets a folder be opened.
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def lock(folder: Path) -> int | None:
    """Takes the folder for one writer. Raises: BlockingIOError if another has it."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks.
        return None
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(opened)
        raise
    return opened


def _bytes_of(rows: Tensor) -> memoryview:
    flat = rows.detach().reshape(-1)
    flat = flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat  # NumPy has no bfloat16.
    return np.ascontiguousarray(flat.numpy()).data.cast("B") if flat.numel() else memoryview(b"")
