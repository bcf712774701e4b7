"""The files of a store: safetensors written as rows arrive, and a manifest that is never half there."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGN = 64
_MOST_ROWS = 10**15


class GrowingFile:
    """One safetensors file of one tensor, written as its rows arrive; `close` gives it its name.

    Until then the bytes are in a file with the suffix .tmp, which nothing reads.
    """

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path = path
        self.rows = 0
        self._name, self._shape, self._dtype = name, shape, dtype
        self._tmp = path.with_suffix(".tmp")
        # Spaces after the header are part of the format; these leave room for any number of rows.
        longest = 8 + len(self._header(_MOST_ROWS))
        self._start = math.ceil(longest / _ALIGN) * _ALIGN
        self._file: BinaryIO = self._tmp.open("wb")
        self._file.write(b"\0" * self._start)

    def write(self, rows: Tensor) -> None:
        """Adds rows; they have the right shape and dtype, and lie on the CPU."""
        self._file.write(_bytes_of(rows))
        self.rows += len(rows)

    def close(self) -> None:
        """Writes the header, brings the bytes to the disk, and puts the file in its place."""
        header = self._header(self.rows)
        self._file.seek(0)
        self._file.write((self._start - 8).to_bytes(8, "little") + header.ljust(self._start - 8))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._tmp, self.path)

    def discard(self) -> None:
        """Forgets the rows."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._tmp.unlink(missing_ok=True)

    def _header(self, rows: int) -> bytes:
        n_bytes = rows * math.prod(self._shape) * self._dtype.itemsize
        entry = {"dtype": CODES[self._dtype], "shape": [rows, *self._shape], "data_offsets": [0, n_bytes]}
        return json.dumps({self._name: entry}, separators=(",", ":")).encode()


class Mapped:
    """The tensor of a file that `GrowingFile` wrote, memory-mapped; writing into it stays in memory."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._raw: np.memmap | None = None
        self.tensor = torch.empty(shape, dtype=dtype)
        if not math.prod(shape):
            return
        with path.open("rb") as opened:
            start = 8 + int.from_bytes(opened.read(8), "little")
        self._raw = np.memmap(path, np.uint8, mode="c", offset=start)
        self.tensor = torch.from_numpy(self._raw).view(dtype).view(shape)

    def expect(self, start: int, stop: int) -> None:
        """Asks the system to read these rows ahead, in one piece."""
        pages: mmap.mmap | None = getattr(self._raw, "_mmap", None)
        if self._raw is None or pages is None or not hasattr(pages, "madvise"):
            return
        # The map begins where an allocation may, at or before the data.
        before = self._raw.offset % mmap.ALLOCATIONGRANULARITY
        first = before + start * self._row_bytes
        last = min(before + stop * self._row_bytes, before + self._raw.nbytes)
        first -= first % mmap.PAGESIZE
        pages.madvise(mmap.MADV_WILLNEED, first, last - first)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, keep_suffix: bool = False) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder at, which then takes its place as a whole.

    The name ends in ".tmp", or as `path` does if `keep_suffix`, for writers that read the format off it.

    A reader sees the old file or the new one; if the block raises, the old one stays. (An old folder is
    gone for the moment between its removal and the new one's renaming.)
    """
    target = Path(path)
    draft = target.with_name(f".part-{target.name}" if keep_suffix else f"{target.name}.tmp")
    _remove(draft)
    try:
        yield draft
        for file in [p for p in draft.rglob("*") if p.is_file()] if draft.is_dir() else [draft]:
            _sync(file)
    except BaseException:
        _remove(draft)
        raise
    if draft.is_dir():
        _remove(target)
    os.replace(draft, target)
    sync_folder(target.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replaces the file as a whole: a reader sees the old one or the new one."""
    with atomic_write(path) as draft:
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
