"""Text and JSON files: written whole, checked where nobody edits them; a bad one is one clear error."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from mm_adapters._errors import CheckpointError, InputError
from mm_adapters.checkpoints.checks import read_json
from mm_adapters.storage.files import write_json

_SUM = "crc32"


def write_document(path: Path, document: dict[str, Any], *, durable: bool = True) -> None:
    """Writes a JSON object as a whole, with a checksum of what it says; `durable` as of `atomic_write`."""
    write_json(path, document | {_SUM: _crc32(document)}, durable=durable)


def read_document(path: Path, *, edited: bool = False) -> dict[str, Any]:
    """What `write_document` wrote; with `edited`, also an object without a checksum.

    Raises: CheckpointError naming the file, if it is missing, no JSON object, or not as it was written.
    """
    document = read_json(path)
    stored = document.pop(_SUM, None)
    if stored != _crc32(document) and not (edited and stored is None):
        hint = f' If it was edited on purpose, take its "{_SUM}" out.' if edited else ""
        raise CheckpointError(f"{path} is damaged: it is not as it was written. Get it again.{hint}")
    return document


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, as a user writes it.

    Raises: InputError naming the file, if it is missing, cannot be read, or is no such text.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"There is no file {path}.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error.reason}). Save it as UTF-8.") from None
    if "\0" in text:
        raise InputError(f"{path} is no text in UTF-8: it holds zero bytes. Save it as UTF-8.")
    return text


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file that a user gives. Raises: InputError naming the file."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__} in JSON, and an object was expected.")
    return value


def _crc32(document: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())
