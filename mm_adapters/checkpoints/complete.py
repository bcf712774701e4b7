"""Does a model hold its checkpoint's weights, each of them, and are they numbers?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_adapters._errors import CheckpointError
from mm_adapters.checkpoints.checks import check_safetensors
from mm_adapters.sites.held import held

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")


def check_report(where: str, report: Mapping[str, Any]) -> None:
    """Passes if a library's report of what it loaded names no weight that was missing.

    Raises: CheckpointError with the missing weights, and those in the files that have no place.
    """
    missing = sorted(report["missing_keys"])
    if not missing:
        return
    spare = sorted(report["unexpected_keys"])
    near = [n for name in missing for n in difflib.get_close_matches(name, spare, n=1, cutoff=0.8)]
    hint = (
        f" Its files have {', '.join(near[:3])}, which the model does not know: is it misspelt?"
        if near
        else ""
    )
    raise CheckpointError(
        f"{where} lacks {len(missing)} weight{'s' * (len(missing) > 1)} of the model: "
        f"{_some(missing)}.{hint} They "
        "would be random. Get the checkpoint again, or load it yourself and pass it to mm_adapters.wrap; of "
        "one model, strict=False leaves them random."
    )


def check_filled(parts: Mapping[str, nn.Module]) -> None:
    """Passes if every weight has a value; those of parts whose checkpoint lacked them have none.

    Raises: CheckpointError naming them.
    """
    for part, module in parts.items():
        empty = [name for name, tensor in module.named_parameters() if tensor.is_meta]
        if empty:
            raise CheckpointError(
                f"{part} lacks {len(empty)} weight{'s' * (len(empty) > 1)} of the model: {_some(empty)}. "
                "Get the checkpoint again."
            )


def check_numbers(name: str, parts: Mapping[str, nn.Module]) -> None:
    """Raises: CheckpointError naming the first weight that holds NaN or infinity."""
    for part, module in parts.items():
        for weight, tensor in module.named_parameters():
            if tensor.is_meta:  # On the disk, or without weights.
                owner, _, leaf = weight.rpartition(".")
                tensor = held(module.get_submodule(owner), leaf)
            if tensor.dtype not in _FLOATS or tensor.is_meta or not tensor.numel():
                continue
            if type(tensor) not in (nn.Parameter, torch.Tensor):  # Packed, into whole numbers.
                continue
            # The least and the most are NaN if one number is; nothing as large as the weight is made.
            low, high = torch.aminmax(tensor.detach())
            if not (torch.isfinite(low) and torch.isfinite(high)):
                at = f"{part}.{weight}" if part else weight
                raise CheckpointError(
                    f"{name}: the weight {at} holds NaN or infinity, so every output would. Get the "
                    "checkpoint again; in another dtype, pass dtype='float32'."
                )


def check_kinds(files: Iterable[Path]) -> None:
    """Raises: CheckpointError naming the first weight that is stored in whole numbers."""
    for file in files:
        for name, entry in check_safetensors(file).items():
            if name.endswith((".weight", ".bias")) and entry["dtype"] in _WHOLE:
                raise CheckpointError(
                    f"{file}: {name} is stored as {entry['dtype']}, whole numbers, and nothing says that "
                    "it is quantised. Get the checkpoint again; load a quantised one yourself and pass it to "
                    "mm_adapters.wrap."
                )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
