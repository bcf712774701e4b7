"""Is a folder a checkpoint that can be read? Found out from its small files, before any weight is."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from mm_adapters._errors import CheckpointError

_STEMS = ("model", "diffusion_pytorch_model", "open_clip_model")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_MAX_HEADER = 100_000_000  # Bytes; the limit of the safetensors format.


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: CheckpointError if it is missing or does not hold one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}. Is it the right folder?") from None
    except (ValueError, RecursionError) as error:  # Also what is no UTF-8.
        raise CheckpointError(f"{path} is not valid JSON: {error}. Get the file again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object. Get it again.")
    return content


def check_pipeline(
    folder: Path, index: dict[str, Any], *, given: Collection[str] = (), variant: str | None = None
) -> dict[str, list[Path]]:
    """The weight files of every component, each of them whole; `given` are not read.

    Raises: CheckpointError naming the first file that is missing, cut or pickled.
    """
    files: dict[str, list[Path]] = {}
    for name, value in index.items():
        if name in given or not isinstance(value, list) or value[0] is None:
            continue
        if not (folder / name).is_dir():
            raise CheckpointError(
                f"{folder} lists the component {name} ({value[1]}) and has no folder {name}. "
                f"Get the checkpoint again, or pass {name}=None if the pipeline can do without."
            )
        if (folder / name / "config.json").is_file():
            files[name] = check_weights(folder / name, variant)
    return files


def check_weights(folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files of one model, each of them whole; with `variant`, those of that name if it has them.

    Raises: CheckpointError if there is none, or one is missing, cut, pickled, or of a variant not asked for.
    """
    for stem in _STEMS:
        files = (_files_of(folder, stem, variant) if variant else []) or _files_of(folder, stem, None)
        if files:
            break
    else:
        raise _no_weights(folder)
    for file in files:
        check_safetensors(file)
    return files


def _files_of(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """model.fp16.safetensors, or what model.safetensors.index.fp16.json lists; none if there is neither."""
    mark = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{mark}.json"
    if not index.is_file():
        single = folder / f"{stem}{mark}.safetensors"
        return [single] if single.is_file() else []
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    missing = [n for n in names if not (folder / n).is_file()]
    if missing or not names:
        raise CheckpointError(
            f"{index} lists {len(names)} files and {len(missing)} are missing: "
            f"{', '.join(missing[:3])}. Get them again."
        )
    return [folder / n for n in names]


def check_safetensors(file: Path) -> dict[str, Any]:
    """The header of a safetensors file whose length is what its header says.

    Raises: CheckpointError if it is missing, cut, or something else.
    """
    if not file.is_file():
        raise CheckpointError(f"There is no file {file}.")
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if start == b"version ":
            raise CheckpointError(
                f"{file} is a Git LFS pointer, not the weights. Run git lfs pull in its folder."
            )
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if size < 8 or size < 8 + length <= _MAX_HEADER:
            raise CheckpointError(f"{file} is cut short: it has {size} bytes. Get it again.")
        header = _header(opened.read(length) if length <= _MAX_HEADER else b"", file)
    ends = [t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"]
    want = 8 + length + max(ends, default=0)
    if size != want:
        fault = "cut short" if size < want else "too long"
        raise CheckpointError(
            f"{file} is {fault}: its header says {want} bytes and it has {size}. Get it again."
        )
    return header


def stored_dtype(file: Path) -> torch.dtype:
    """The dtype most of a file's numbers are stored in; float32 if in none that is a float's."""
    header = check_safetensors(file)
    counts: Counter[str] = Counter()
    for name, tensor in header.items():
        if name != "__metadata__" and tensor["dtype"] in _DTYPES:
            start, end = tensor["data_offsets"]
            counts[tensor["dtype"]] += end - start
    return _DTYPES[counts.most_common(1)[0][0]] if counts else torch.float32


def _header(raw: bytes, file: Path) -> dict[str, Any]:
    try:
        header = json.loads(raw)
        assert isinstance(header, dict)
        for name, tensor in header.items():
            texts = name == "__metadata__"
            assert all(isinstance(text, str) for text in tensor.values()) if texts else _is_entry(tensor)
    except (ValueError, AssertionError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{file} is not a safetensors file: its header cannot be read. Get it again."
        ) from None
    return header


def _is_entry(tensor: Any) -> bool:
    """Whether a header says of a tensor what it must."""
    first, last = tensor["data_offsets"]
    numbers = [first, last, *tensor["shape"]]
    return (
        isinstance(tensor["dtype"], str) and all(isinstance(n, int) for n in numbers) and 0 <= first <= last
    )


def _no_weights(folder: Path) -> CheckpointError:
    variants = sorted(
        {v for stem in _STEMS for p in folder.glob(f"{stem}.*.safetensors*") if (v := _variant(p))}
    )
    if variants:
        return CheckpointError(
            f"{folder} has only weights of the variant{'s' * (len(variants) > 1)} {', '.join(variants)}. "
            "Load it "
            f'with variant="{variants[0]}".'
        )
    pickled = sorted(p.name for pattern in _PICKLED for p in folder.glob(pattern))
    if pickled:
        return CheckpointError(
            f"{folder} has only pickled weights ({', '.join(pickled[:3])}), which can run code as they "
            "are read, so they are not. If you trust them, convert them once: "
            "cls.from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)."
        )
    return CheckpointError(
        f"{folder} has a configuration and no weights. Expected {_STEMS[0]}.safetensors, or "
        f"{_STEMS[1]}.safetensors. Get the checkpoint again."
    )


def _variant(file: Path) -> str:
    """fp16 of model.fp16.safetensors and of model.safetensors.index.fp16.json; "" without one."""
    parts = [p.partition("-")[0] for p in file.name.split(".")]
    rest = [p for p in parts[1:] if p not in ("safetensors", "index", "json")]
    return rest[0] if rest else ""
