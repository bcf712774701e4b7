"""A long pass over images that goes on, after a kill, where it last wrote down what it had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.record import Record
from methods_multimodal.core.running import newest, recent
from mm_adapters import InputError, StoreError
from mm_adapters.inputs.images import image_files, to_rgb
from mm_adapters.store import SaveClock


@dataclass(frozen=True)
class Progress(Record):
    """What a pass has after its first `position` items; `unreadable` are items it had to skip."""

    settings: str
    position: int
    state: dict[str, Tensor]
    unreadable: tuple[tuple[int, str], ...] = ()


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
    """`step(state, images, their numbers)` over all items, batch by batch.

    It is saved after `every` so many batches at the latest, and before if saving costs little of the time.

    A batch always holds the same items, so a pass that was killed gives the same numbers as one that
    was not. Items that cannot be read end it with an error that names them; what was done is kept.

    Raises: InputError for an unreadable item; StoreError for a `file` that holds another pass, or is damaged.
    """
    done = Progress(settings, 0, start)
    if file is not None and (found := newest(file, _read_progress)) is not None:
        done = found[1]
        if done.settings != settings:
            raise StoreError(
                f"{file} holds the progress of another run (other images, model or settings). Pass "
                f"another folder, or delete {file.parent} to start afresh."
            )
        if done.unreadable and not skip_unreadable:
            number, why = done.unreadable[0]
            raise _unreadable(items[number], number, why)
    clock, unsaved = SaveClock(n=-(-len(items) // batch_size)), 0
    try:
        with tqdm(total=len(items), initial=done.position, desc=label, unit="image", disable=None) as bar:
            for first in range(done.position, len(items), batch_size):
                last = min(first + batch_size, len(items))
                images, numbers, bad = _read(items, range(first, last), skip_unreadable)
                state = step(done.state, images, numbers) if numbers else done.state
                done = replace(done, position=last, state=state, unreadable=(*done.unreadable, *bad))
                unsaved += 1
                bar.update(last - first)
                if file is not None and (unsaved >= every or last == len(items)):
                    done.save(file)
                    recent(file).unlink(missing_ok=True)
                    unsaved = 0
                elif file is not None and clock.is_due():
                    with clock.saving():
                        done.save(recent(file), durable=False)
    except BaseException:
        if file is not None and unsaved:
            with suppress(StoreError):  # What was saved before stays.
                done.save(file)
        raise
    return done


def _read_progress(path: Path) -> tuple[int, Progress]:
    done = Progress.load(path)
    return done.position, done


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
                raise _unreadable(items[i], i, str(error)) from error
            bad.append((i, str(error)))
    return images, numbers, bad


def _unreadable(item: Any, number: int, why: str) -> InputError:
    return InputError(
        f"{name_of(item, number)} cannot be read: {why} Remove or repair it, or skip what cannot be read "
        "(skip_unreadable=True, --skip-unreadable)."
    )
