"""What a method returns: a frozen record that is saved as one safetensors file with JSON in its header."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mm_adapters import InputError
from mm_adapters.store import atomic_write

R = TypeVar("R", bound="Record")


class Record:
    """Saving and loading of a frozen dataclass of tensors, dicts of tensors, and plain values."""

    def save(self, path: str | Path) -> Path:
        """Writes the record; a write that is cut short leaves what was there before."""
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for name, value in self._items():
            if isinstance(value, Tensor):
                tensors[name] = value.detach().cpu().contiguous()
            elif isinstance(value, dict):
                plain[name] = {"keys": list(value)}
                tensors |= {f"{name}/{k}": v.detach().cpu().contiguous() for k, v in value.items()}
            else:
                plain[name] = value
        header = {"record": type(self).__name__, "values": json.dumps(plain)}
        with atomic_write(path, keep_suffix=True) as part:
            save_file(tensors, part, metadata=header)
        return path

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """The record in a file. Raises: InputError if the file holds another one."""
        with safe_open(path, framework="pt") as opened:
            header = opened.metadata() or {}
            if header.get("record") != cls.__name__:
                raise InputError(f"{path} holds {header.get('record') or 'no record'}, not a {cls.__name__}.")
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        values = {k: _tupled(v) for k, v in json.loads(header["values"]).items()}
        for name, value in values.items():
            if isinstance(value, dict):
                values[name] = {key: tensors.pop(f"{name}/{key}") for key in value["keys"]}
        return cls(**tensors, **values)

    def _items(self) -> list[tuple[str, Any]]:
        assert dataclasses.is_dataclass(self)
        return [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]


def _tupled(value: Any) -> Any:
    # JSON has no tuples, and frozen records hold no lists.
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
