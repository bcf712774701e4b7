"""Training pictures with their captions: a folder, or the pictures a shipped model was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mm_adapters import InputError
from mm_adapters.inputs.images import image_files, readable_files, to_rgb
from mm_adapters.store import read_text

_ZOO = "zoo:"


@dataclass(frozen=True)
class Pictures:
    """Training pictures: `names` for people, `captions`, and `files` (None: of the zoo, by number).

    `unreadable` are files that were left out, each with the reason.
    """

    names: tuple[str, ...]
    captions: tuple[str, ...]
    files: tuple[Path, ...] | None = None
    unreadable: tuple[tuple[str, str], ...] = ()

    def image(self, index: int, side_px: int | None = None) -> Image.Image:
        """Picture number `index`, scaled to a square if a side is given."""
        if self.files is None:
            from mm_adapters.zoo.sd import training_example

            opened = Image.fromarray(training_example(index)[0])
        else:
            opened = to_rgb(self.files[index])
        if side_px is None or opened.size == (side_px, side_px):
            return opened
        return opened.resize((side_px, side_px), Image.Resampling.LANCZOS)

    def images(self, side_px: int | None = None) -> Sequence[Image.Image]:
        """All of them."""
        return [self.image(i, side_px) for i in range(len(self.names))]


def read_pictures(source: str | Path, *, skip_unreadable: bool = False) -> Pictures:
    """A folder with captions, or "zoo:N": the first N pictures that tiny-sd was trained on.

    A folder's captions are in metadata.jsonl, a line {"file_name": ..., "text": ...} each, or a .txt
    beside each picture.

    `skip_unreadable` leaves out what cannot be read; `unreadable` lists it.

    Raises: InputError for a folder without pictures, a picture without a caption, or a bad number.
    """
    text = str(source)
    if text.startswith(_ZOO):
        return _of_zoo(text.removeprefix(_ZOO))
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Give a folder of pictures, or zoo:256.")
    found = image_files(folder, recursive=False, verify=not skip_unreadable, min_images=2)
    files, skipped = readable_files(found, skip_unreadable=skip_unreadable, min_images=2)
    captions = _captions(folder, files)
    unreadable = tuple((path.name, why) for path, why in skipped)
    return Pictures(tuple(p.name for p in files), captions, tuple(files), unreadable)


def _of_zoo(number: str) -> Pictures:
    from mm_adapters.zoo.sd import N_TRAINING, training_caption, training_scene

    if not number.isdigit() or not 2 <= int(number) <= N_TRAINING:
        raise InputError(
            f"zoo:{number}: tiny-sd has 2 to {N_TRAINING} training pictures to give, as zoo:256."
        )
    captions = tuple(training_caption(training_scene(i), i) for i in range(int(number)))
    return Pictures(tuple(f"zoo {i}" for i in range(int(number))), captions)


def _captions(folder: Path, files: Sequence[Path]) -> tuple[str, ...]:
    listed: dict[str, Any] = {}
    table = folder / "metadata.jsonl"
    if table.is_file():
        for number, line in enumerate(read_text(table).splitlines(), start=1):
            try:
                row = json.loads(line)
                name, text = row["file_name"], row["text"]
                if not isinstance(name, str) or not isinstance(text, str):
                    raise TypeError
                listed[name] = text
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(f'{table}, line {number}: not {{"file_name": ..., "text": ...}}.') from None
    for path in files:
        beside = path.with_suffix(".txt")
        if path.name not in listed and beside.is_file():
            listed[path.name] = read_text(beside).strip()
    missing = [p.name for p in files if p.name not in listed]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(files)} pictures have no caption ({', '.join(missing[:3])}): write "
            f"{table.name} or a .txt beside each."
        )
    return tuple(str(listed[p.name]) for p in files)
