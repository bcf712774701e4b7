"""Parts of a result that are written down as they are made, and read when the same is made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from methods_multimodal.core.record import Record
from mm_adapters import CheckpointError, Model, StoreError
from mm_adapters.store import kept_calls, load_tensors, provenance, save_tensors, work_folder

R = TypeVar("R", bound=Record)


class Kept:
    """The parts in one folder; without a folder each part is made, and nothing is written."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def record(self, name: str, kind: type[R], make: Callable[[], R]) -> R:
        """The part of this name. Raises: StoreError if its file is damaged."""
        file = self._file(name)
        if file is None:
            return make()
        if not file.is_file():
            make().save(file)
        # Read in either case: sums over numbers that lie otherwise in memory differ in the last bit.
        return self._read(lambda: kind.load(file))

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The same of plain tensors, on the CPU."""
        file = self._file(name)
        if file is None:
            return make()
        if not file.is_file():
            save_tensors(file, make(), {})
        return self._read(lambda: load_tensors(file)[0])

    @contextmanager
    def calls(self, model: Model) -> Iterator[Callable[[str], None]]:
        """Inside, a sampling loop that was killed goes on at the step where it was (`kept_calls`).

        What is made of it is stored inside too. Gives what is called with each part's name, if there are
        several.
        """
        if self.folder is None:
            yield lambda name: None
            return
        with kept_calls(model, self.folder / "calls") as calls:
            yield calls.begin

    def inside(self, name: str) -> Path | None:
        """A folder for a part that writes down its own progress; None without a folder."""
        return None if self.folder is None else self.folder / name

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def _read(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (CheckpointError, ValueError) as error:
            raise StoreError(f"{error} Delete {self.folder} to start afresh.") from None


@contextmanager
def kept(folder: str | Path | None, **made_of: Any) -> Iterator[Kept]:
    """`Kept` of a folder that is one work's, as `work_folder` checks; `made_of` is what `provenance` takes.

    Raises: StoreError as `work_folder`.
    """
    if folder is None:
        yield Kept(None)
        return
    with work_folder(folder, provenance(**made_of)) as work:
        yield Kept(work)
