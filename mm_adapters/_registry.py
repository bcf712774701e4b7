"""One table: the class of a module, as "package:Class", to the record that describes it."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from typing import Any, TypeVar

from mm_adapters._errors import UnknownFamilyError
from mm_adapters._spec import Kind, Mount, Mounts, Tower

Record = TypeVar("Record", Tower, Mounts)

_RECORDS: dict[tuple[type, str], Tower | Mounts] = {}


def register(record: Record) -> Record:
    """Adds a record for each of its classes; returns it.

    Raises: ValueError if another record already covers one of the classes or has its name.
    """
    for key in (*record.classes, f"name:{record.name}"):
        known = _RECORDS.setdefault((type(record), key), record)
        if known != record:
            raise ValueError(
                f"{key} already belongs to {known.name!r}, not {record.name!r}: "
                "a class has one record. Drop it from one of the two."
            )
    return record


def records() -> list[Tower | Mounts]:
    """Every record that is registered, towers first, by name."""
    _import_families()
    unique = {(type(r).__name__, r.name): r for r in _RECORDS.values()}
    return [unique[k] for k in sorted(unique, key=lambda k: (k[0] != "Tower", k[1]))]


def find(kind: type[Record], model: Any) -> Record | None:
    """The record of `model`'s class or its nearest base class, or None."""
    _import_families()
    for cls in type(model).__mro__:
        found = _RECORDS.get((kind, key_of(cls)))
        if found is not None:
            return found  # type: ignore[return-value]
    return None


def covers(cls: type) -> bool:
    """Whether a family covers a class, or one that it is made from."""
    _import_families()
    return any((kind, key_of(base)) in _RECORDS for base in cls.__mro__ for kind in (Mounts, Tower))


def by_name(kind: type[Record], name: str) -> Record:
    """The record called `name`."""
    _import_families()
    return _RECORDS[kind, f"name:{name}"]  # type: ignore[return-value]


def lookup(model: Any) -> Mounts:
    """How `model` is put together; a tower that stands alone is a composite of one.

    Raises: UnknownFamilyError if no family covers its class.
    """
    mounts = find(Mounts, model)
    if mounts is not None:
        return mounts
    tower = find(Tower, model)
    if tower is not None:
        return Mounts(tower.name, "tower", tower.classes, {tower.role: Mount("")})
    raise unknown(model, Mounts)


def unknown(model: Any, kind: type) -> UnknownFamilyError:
    """The error for a class that no family covers: it names the nearest and shows a record to start from.

    The record is read off the model; without its modules (a class alone) only its outline is shown.
    """
    from mm_adapters._draft import draft
    from mm_adapters._nearest import nearest

    key = key_of(type(model))
    near, record = nearest(model), draft(model)
    if not near:
        known = sorted(k for t, k in _RECORDS if t in (Mounts, Tower) and not k.startswith("name:"))
        close = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or known
        near = f"The nearest by name are {', '.join(close)}."
    if not record:
        outline = (
            f'Mounts("mine", "contrastive", ("{key}",), '
            '{"vision": Mount("path.to.vision"), "text": Mount("path.to.text")})'
            if kind is Mounts
            else f'Tower("mine", "vision", ("{key}",), {{"blocks": Stack(("layers.*",), {{}})}})'
        )
        record = (
            "from mm_adapters._registry import register\n"
            f"from mm_adapters._spec import Mount, Mounts, Stack, Tower\n\nregister({outline})"
        )
    return UnknownFamilyError(
        f"No family covers {key}. {near} Describe it in a record, as mm_adapters/families/README.md "
        "says, and run that before you load the model. As far as it can be read off the model:\n\n"
        f"{record}\n"
    )


def kind_of(model: Any) -> Kind:
    """ "contrastive", "vlm", "diffusion" or "tower"."""
    return lookup(model).kind


def key_of(cls: type) -> str:
    """A class as records name it, with its package before it."""
    return f"{cls.__module__.partition('.')[0]}:{cls.__name__}"


@cache
def _import_families() -> None:
    import mm_adapters.families as package

    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{found.name}")
