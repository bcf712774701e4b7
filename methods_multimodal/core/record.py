"""What a method returns: a frozen record that is saved as one safetensors file with JSON in its header."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from mm_adapters import CheckpointError, InputError
from mm_adapters.store import load_tensors, save_tensors

R = TypeVar("R", bound="Record")


class Record:
    """Saving and loading of a frozen dataclass of tensors, dicts of tensors, and plain values."""

    def save(self, path: str | Path, *, durable: bool = True) -> Path:
        """Writes the record; a write that is cut short leaves what was there before.

        Equal records are equal bytes. If not `durable`, it outlives the process, and not for certain a power
        failure. Raises: StoreError if it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for name, value in self._items():
            if isinstance(value, Tensor):
                tensors[name] = value
            elif isinstance(value, dict):
                plain[name] = {"keys": list(value)}
                tensors |= {f"{name}/{k}": v for k, v in value.items()}
            else:
                plain[name] = value
        return save_tensors(
            path, tensors, {"record": type(self).__name__, "values": json.dumps(plain)}, durable=durable
        )

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """The record in a file.

        Raises: CheckpointError naming the file, if it is missing or damaged; InputError if it holds another
        record.
        """
        tensors, facts = load_tensors(path)
        if facts.get("record") != cls.__name__:
            raise InputError(f"{path} holds {facts.get('record') or 'no record'}, not a {cls.__name__}.")
        try:
            values = {k: _tupled(v) for k, v in json.loads(facts["values"]).items()}
            for name, value in values.items():
                if isinstance(value, dict):
                    values[name] = {key: tensors.pop(f"{name}/{key}") for key in value["keys"]}
            return cls(**tensors, **values)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is not the whole of a {cls.__name__} ({type(error).__name__}: {error}). Get it "
                "again, or delete it and make it again."
            ) from None

    def _items(self) -> list[tuple[str, Any]]:
        assert dataclasses.is_dataclass(self)
        return [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]


def _tupled(value: Any) -> Any:
    # JSON has no tuples, and frozen records hold no lists.
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
