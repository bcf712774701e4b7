"""What stored work was made of, kept beside it: work is gone on with only for the same.

made_of = provenance(model=model, data=images, sites=names, batch_size=32)
with work_folder(folder, made_of) as folder: ...
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm_adapters._errors import CheckpointError, StoreError
from mm_adapters.storage.documents import read_document, write_document
from mm_adapters.storage.files import lock
from mm_adapters.storage.fingerprint import of_data, of_model, of_value

# What the code writes: work of another number is not gone on with.
FORMAT = 3
FILE = "made_of.json"
_SHOWN = 60  # Letters of a value in an error.


def provenance(
    *, data: Any = None, sites: Sequence[str] = (), models: Mapping[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """What work is made of, in JSON's types.

    Args:
        data: Items, by whose content the work goes: files, pictures, tensors, texts, mappings of such.
        sites: What is read.
        models: Each `mm.Model` that the numbers depend on, by what it is there ("model", "judge").
        settings: All else that the numbers depend on; plain values stay readable, others become a hash.

    Raises: InputError for data or a setting without content that could be hashed.
    """
    made_of: dict[str, Any] = {"format": FORMAT, "settings": {k: _setting(v) for k, v in settings.items()}}
    if data is not None:
        made_of["data"] = of_data(data)
    if sites:
        made_of["sites"] = list(sites)
    for name, model in (models or {}).items():
        made_of[name] = of_model(model)
    return json.loads(json.dumps(made_of))


def differences(was: Any, now: Any, at: str = "") -> dict[str, tuple[Any, Any]]:
    """What differs between two mappings, by dotted name: (there, asked for)."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*now, *(k for k in was if k not in now)]:
            found |= differences(was.get(key), now.get(key), f"{at}.{key}" if at else str(key))
        return found
    return {} if was == now else {at: (was, now)}


def check_same_work(where: Path | str, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises: StoreError naming what differs between the work that is there and the one asked for."""
    differ = differences(was, now)
    if not differ:
        return
    name, (there, asked) = next(iter(differ.items()))
    names = ", ".join(list(differ)[:6]) + (", ..." if len(differ) > 6 else "")
    raise StoreError(
        f"{where} holds work of something else: {names} differ ({name}: there {_shown(there)}, asked for "
        f"{_shown(asked)}). Choose a new folder, or delete this one to start afresh."
    )


@contextmanager
def work_folder(folder: str | Path, made_of: Mapping[str, Any]) -> Iterator[Path]:
    """A folder for work that is gone on with, made if need be; nobody else works in it meanwhile.

    What the work is made of is written there before anything else.

    Raises: StoreError if it holds work of something else, another process works there, or it cannot be
    written.
    """
    folder = Path(folder)
    with exclusive(folder):
        note = folder / FILE
        if note.exists():
            try:
                stored = read_document(note)
            except CheckpointError as error:
                raise StoreError(f"{error} Or delete {folder} to start afresh.") from None
            check_same_work(folder, stored, made_of)
        else:
            write_document(note, dict(made_of))
        yield folder


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Takes a folder, made if need be, for one user. Raises: StoreError if there is another one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder)
    except BlockingIOError:
        raise StoreError(
            f"Another process works in {folder}. Wait for it, or choose another folder."
        ) from None
    except OSError as error:
        raise StoreError(f"{folder} cannot be a folder of results: {error.strerror or error}.") from None
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def _setting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _setting(v) for k, v in value.items()}
    if isinstance(value, list | tuple | range) and len(value) <= 64:
        return [_setting(v) for v in value]
    if (
        value is None
        or isinstance(value, bool | int | float)
        or (isinstance(value, str) and len(value) < 200)
    ):
        return value
    return of_value(value)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
