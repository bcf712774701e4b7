"""Tensors with some texts in one safetensors file, whose bytes are a function of what is in it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mm_adapters._errors import CheckpointError
from mm_adapters.checkpoints.checks import check_safetensors
from mm_adapters.storage.files import atomic_write

_SUM = "crc32"


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str], *, durable: bool = True
) -> Path:
    """Writes the file as a whole: safetensors, with `facts` and a checksum of all in its header.

    The same content is the same bytes; `durable` as of `atomic_write`.

    Raises: StoreError if it cannot be written; what was there stays.
    """
    path = Path(path)
    # Copies, since safetensors takes no two tensors of one memory.
    ready = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
    header = {**facts, _SUM: _crc32(ready, facts)}
    with atomic_write(path, keep_suffix=True, durable=durable) as part:
        save_file(ready, part, metadata=header)
        _sort_header(part)
    return path


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the facts of a file; of another's file too, if it is safetensors.

    Raises: CheckpointError naming the file, if it is missing, cut or changed.
    """
    path = Path(path)
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as opened:
            facts = dict(opened.metadata() or {})
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  It is no dict.
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Get it again, or delete it.") from None
    stored = facts.pop(_SUM, None)
    if stored is not None and stored != _crc32(tensors, facts):
        raise CheckpointError(
            f"{path} is damaged: it is not as it was written. Get it again, or delete it and make it again."
        )
    return tensors, facts


def _crc32(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    total = zlib.crc32(json.dumps(dict(facts), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode(), total)
        # A dimension of one may have any stride, and `contiguous` leaves it.
        raw = tensor.contiguous().as_strided((tensor.numel(),), (1,))
        if raw.numel():
            total = zlib.crc32(raw.view(torch.uint8).numpy().data, total)
    return str(total)


def _sort_header(file: Path) -> None:
    """Puts the header's texts in order: safetensors writes them in an order that changes from run to run."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        opened.seek(8)
        opened.write(text.ljust(length))
