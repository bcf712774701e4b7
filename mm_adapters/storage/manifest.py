"""What a store's manifest says: its columns, what they are about, and how much is in each shard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm_adapters._errors import CheckpointError, StoreError
from mm_adapters.storage.documents import read_document, write_document
from mm_adapters.storage.files import CODES
from mm_adapters.storage.provenance import check_same_work

FORMAT = "mm_adapters.store/2"
MANIFEST = "manifest.json"
# Of the shard that is not closed, how much is stored all the same.
OPEN = "open.json"


@dataclass(frozen=True)
class Column:
    """One named value of every row: its shape without the row axis, and its dtype on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if self.dtype not in CODES:
            raise StoreError(f"A column cannot be {self.dtype}; it can be {', '.join(map(str, CODES))}.")

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def file_name(shard: int, column: int) -> str:
    """The file of one column of one shard."""
    return f"{shard:06d}-{column:02d}.safetensors"


def new_manifest(columns: Mapping[str, Column], about: dict[str, Any], shard_bytes: int) -> dict[str, Any]:
    """The manifest of a store without rows. Raises: StoreError if `about` is not JSON."""
    try:
        about = json.loads(json.dumps(about))  # Tuples become lists, as they will be when read again.
    except TypeError as error:
        raise StoreError(f"`about` goes into a JSON file: {error}.") from None
    return {
        "format": FORMAT,
        "columns": [{"name": n, "shape": list(c.shape), "dtype": CODES[c.dtype]} for n, c in columns.items()],
        "about": about,
        "shard_bytes": shard_bytes,
        "shards": [],
        "complete": False,
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises: StoreError if the folder has none, one of another format, or a damaged one."""
    if not (folder / MANIFEST).is_file():
        raise StoreError(f"{folder} is no store: it has no {MANIFEST}.")
    try:
        manifest = read_document(folder / MANIFEST)
    except CheckpointError as error:
        raise StoreError(f"{error} Or delete {folder} and make it again.") from None
    if manifest.get("format") != FORMAT:
        raise StoreError(
            f"{folder} is a store of the format {manifest.get('format')!r}; this reads {FORMAT!r}. Delete "
            "it and make it again."
        )
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replaces the manifest as a whole, with a checksum of what it says."""
    write_document(folder / MANIFEST, manifest)


def check_same(folder: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises: StoreError naming what differs between the store that is there and the one asked for."""
    was, now = (
        {"columns": m["columns"], "shard_bytes": m["shard_bytes"], **m["about"]} for m in (stored, asked)
    )
    check_same_work(folder, was, now)
