"""A long pass over images that goes on, after a kill, where it last wrote down what it had."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.record import Record
from mm_adapters import InputError
from mm_adapters.inputs.images import image_files, to_rgb


@dataclass(frozen=True)
class Progress(Record):
    """What a pass has after its first `position` items; `unreadable` are items it had to skip."""

    settings: str
    position: int
    state: dict[str, Tensor]
    unreadable: tuple[tuple[int, str], ...] = ()


def fingerprint(**settings: Any) -> str:
    """What a pass depends on, as short text: two passes with the same are the same pass."""
    parts = {k: _digest(v) for k, v in sorted(settings.items())}
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def all_images(images: Any) -> Sequence[Any]:
    """The images as a sequence that can be read twice: files of a folder, or what was given.

    Raises: InputError for something that can be read only once, or holds no image.
    """
    if isinstance(images, str | PathLike):
        path = Path(images)
        if not path.is_dir():
            raise InputError(f"There is no folder {path}.")
        return image_files(path)
    images = list(images) if isinstance(images, Tensor) else images
    if isinstance(images, Sequence):
        if len(images) == 0:
            raise InputError("There are no images.")
        return images
    raise InputError(
        f"Images are read more than once, and {type(images).__name__} can be read once only. Pass a folder, "
        "or a list."
    )


def name_of(item: Any, index: int) -> str:
    """What to call an image: its file, or its number."""
    return fspath(item) if isinstance(item, str | PathLike) else f"image {index}"


def run_pass(
    items: Sequence[Any],
    step: Callable[[dict[str, Tensor], list[Any], list[int]], dict[str, Tensor]],
    start: dict[str, Tensor],
    *,
    settings: str,
    file: Path | None,
    batch_size: int,
    skip_unreadable: bool = False,
    every: int = 16,
    label: str = "images",
) -> Progress:
    """`step(state, images, their numbers)` over all items, batch by batch; `every` so many it is saved.

    A batch always holds the same items, so a pass that was killed gives the same numbers as one that
    was not. Items that cannot be read end it with an error that names them; what was done is kept.

    Raises: InputError for an unreadable item, or a `file` that holds another pass.
    """
    done = Progress(settings, 0, start)
    if file is not None and file.is_file():
        done = Progress.load(file)
        if done.settings != settings:
            raise InputError(
                f"{file.parent} holds the progress of another run (other images, model or settings). Pass "
                "another folder, or delete this one."
            )
    with tqdm(total=len(items), initial=done.position, desc=label, unit="image", disable=None) as bar:
        for count, first in enumerate(range(done.position, len(items), batch_size), start=1):
            last = min(first + batch_size, len(items))
            try:
                images, numbers, bad = _read(items, range(first, last), skip_unreadable)
            except InputError:
                if file is not None:
                    done.save(file)
                raise
            state = step(done.state, images, numbers) if numbers else done.state
            done = replace(done, position=last, state=state, unreadable=(*done.unreadable, *bad))
            bar.update(last - first)
            if file is not None and (count % every == 0 or last == len(items)):
                done.save(file)
    return done


def _read(
    items: Sequence[Any], which: range, skip: bool
) -> tuple[list[Any], list[int], list[tuple[int, str]]]:
    images, numbers, bad = [], [], []
    for i in which:
        try:
            images.append(items[i] if isinstance(items[i], Tensor) else to_rgb(items[i]))
            numbers.append(i)
        except (InputError, OSError) as error:
            if not skip:
                raise InputError(
                    f"{name_of(items[i], i)} cannot be read: {error} Remove or repair it, or skip what "
                    "cannot be read (skip_unreadable=True, --skip-unreadable)."
                ) from error
            bad.append((i, str(error)))
    return images, numbers, bad


def _digest(value: Any) -> Any:
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().float().numpy().tobytes()
        return hashlib.sha256(raw).hexdigest()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_digest(v) for v in value]
    if isinstance(value, Path):
        return [value.name, value.stat().st_size]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__
