"""Whether plain values fit the fields of one of SAELens' configs, found out before one is made of them."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from mm_adapters import InputError

_POSITIVE = (
    "d_in", "d_sae", "d_out", "k", "total_training_samples", "train_batch_size_samples", "lr",
    "dead_feature_window", "feature_sampling_window", "n_batches_for_norm_estimate", "max_iterations",
)  # fmt: skip
# Taken by SAELens, though its types do not say so.
_MORE = {"normalize_activations": ("constant_norm_rescale",)}


def check_fields(kind: type[Any], values: Mapping[str, Any]) -> None:
    """Raises: InputError for a field that there is none of, or a value that it cannot have."""
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    unknown = [k for k in values if k not in known]
    if unknown:
        raise InputError(f"{kind.__name__} has no {unknown[0]!r}; it has {', '.join(known)}.")
    for name, value in values.items():
        if value in _MORE.get(name, ()) if isinstance(value, str) else False:
            continue
        if not _fits(value, hints[name]):
            raise InputError(f"{name} is {value!r}, and {kind.__name__} takes {_named(hints[name])}.")
        if not _is_sensible(value, name in _POSITIVE):
            what = "a positive number" if name in _POSITIVE else "a finite number"
            raise InputError(f"{name} is {value!r}: it is {what}.")
    k, d_sae = values.get("k"), values.get("d_sae")
    if k is not None and d_sae is not None and k > d_sae:
        raise InputError(f"k is {k:g}, and there are d_sae={d_sae} latents: give k up to {d_sae}.")
    dtype = values.get("dtype")
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else torch.float32
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise InputError(f"dtype is {dtype!r}; give float32, float16 or bfloat16.")


def check_required(kind: type[Any], values: Mapping[str, Any]) -> None:
    """Raises: InputError for a field without a default that has no value."""
    missing = [
        f.name
        for f in fields(kind)
        if f.init and f.default is MISSING and f.default_factory is MISSING and f.name not in values
    ]
    if missing:
        raise InputError(f"{kind.__name__} needs {', '.join(missing)}.")


def _is_sensible(value: Any, positive: bool) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return True
    return math.isfinite(value) and (value > 0 or not positive)


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any or (origin is None and not isinstance(hint, type)):
        return True
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in inside)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin in (list, tuple, set):
        return isinstance(value, list | tuple | set) and all(_fits(v, inside[0]) for v in value if inside)
    if origin is not None:
        return isinstance(value, origin) if isinstance(origin, type) else True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _named(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
