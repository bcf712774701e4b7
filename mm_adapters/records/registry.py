"""One table: the class of a module, as "package:Class", to the record that describes it."""

from __future__ import annotations

from typing import Any, TypeVar

from mm_adapters._errors import InputError
from mm_adapters.records.spec import ModelRecord, Tower

Record = TypeVar("Record", Tower, ModelRecord)

_RECORDS: dict[tuple[type, str], Tower | ModelRecord] = {}


def register(record: Record) -> Record:
    """Adds a record for each of its classes; returns it.

    Raises: InputError if another record already covers one of the classes or has its name.
    """
    for key in (*record.classes, f"name:{record.name}"):
        known = _RECORDS.setdefault((type(record), key), record)
        if known != record:
            raise InputError(
                f"{key} already belongs to {known.name!r}, not {record.name!r}: "
                "a class has one record. Drop it from one of the two."
            )
    return record


def records() -> list[Tower | ModelRecord]:
    """Every record that is registered, towers first, by name."""
    unique = {(type(r).__name__, r.name): r for r in _RECORDS.values()}
    return [unique[k] for k in sorted(unique, key=lambda k: (k[0] != "Tower", k[1]))]


def find(kind: type[Record], model: Any) -> Record | None:
    """The record of `model`'s class or its nearest base class, or None."""
    for cls in type(model).__mro__:
        record = _RECORDS.get((kind, key_of(cls)))
        if record is not None:
            return record  # type: ignore[return-value]
    return None


def covers(cls: type) -> bool:
    """Whether a family covers a class, or one that it is made from."""
    return any((kind, key_of(base)) in _RECORDS for base in cls.__mro__ for kind in (ModelRecord, Tower))


def by_name(kind: type[Record], name: str) -> Record:
    """The record called `name`."""
    return _RECORDS[kind, f"name:{name}"]  # type: ignore[return-value]


def key_of(cls: type) -> str:
    """A class as records name it, with its package before it."""
    return f"{cls.__module__.partition('.')[0]}:{cls.__name__}"
