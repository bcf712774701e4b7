"""Calls of sampling loops in a folder, for the time until what is made of them is stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from mm_adapters._errors import CheckpointError, StoreError
from mm_adapters.runs.kept_calls import remembering
from mm_adapters.runs.model import Model
from mm_adapters.storage.fingerprint import of_value
from mm_adapters.storage.save_clock import SaveClock
from mm_adapters.storage.tensor_files import load_tensors, save_tensors

_CALLS = "calls"


class FolderOfCalls:
    """Keeps calls by name. What was put last may not be there yet: saving takes a small share of the time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clock = SaveClock()
        self._pending: dict[str, tuple[Mapping[str, Tensor], Mapping[str, str]]] = {}
        self._name, self._n_runs = "", 0
        self._file_of: dict[str, Path] = {}
        self._last: tuple[Path, dict[str, Tensor], dict[str, str]] | None = None
        for path in sorted(folder.glob("*.safetensors")):
            with suppress(CheckpointError, ValueError, KeyError):  # Damaged: its calls are computed again.
                self._file_of |= dict.fromkeys(json.loads(load_tensors(path)[1][_CALLS]), path)
        self._n_files = max((int(p.stem) for p in self._file_of.values()), default=0)

    def begin(self, name: str) -> None:
        """What runs now has this name; calls of other names are done with, and deleted."""
        self._name, self._n_runs, self._pending = name, 0, {}
        for path in {p for call, p in self._file_of.items() if not call.startswith(f"{name}/")}:
            path.unlink(missing_ok=True)
        self._file_of = {call: p for call, p in self._file_of.items() if call.startswith(f"{name}/")}

    def next_run(self) -> str:
        """A name for the run that begins; the same one after a kill."""
        self._n_runs += 1
        return f"{self._name}/{self._n_runs}"

    def key(self, given: Any) -> str:
        """A hash of what a call was given."""
        return of_value(given)

    def get(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """What is kept under this name."""
        path = self._file_of.get(name)
        if path is None:
            return None
        if self._last is None or self._last[0] != path:
            self._last = (path, *load_tensors(path))
        _, tensors, facts = self._last
        start = f"{name}/"
        own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        return own, json.loads(facts[_CALLS])[name]

    def put(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Keeps it. Raises: StoreError if it cannot be written."""
        self._pending[name] = {k: t.to("cpu", copy=True) for k, t in tensors.items()}, facts
        if self._clock.is_due():
            with self._clock.saving():
                self.flush()

    def flush(self) -> None:
        """Writes down what is not yet. Raises: StoreError if it cannot be written."""
        if not self._pending:
            return
        self._n_files += 1
        path = self._folder / f"{self._n_files:08d}.safetensors"
        tensors = {f"{n}/{k}": t for n, (ts, _) in self._pending.items() for k, t in ts.items()}
        facts = {name: dict(facts) for name, (_, facts) in self._pending.items()}
        save_tensors(path, tensors, {_CALLS: json.dumps(facts)}, durable=False)
        self._pending.clear()


@contextmanager
def kept_calls(model: Model, folder: str | Path) -> Iterator[FolderOfCalls]:
    """Inside, the denoiser's calls of `model.run` are kept in the folder, and are not computed again.

    It is of this work alone: a folder below that of `work_folder`. When the block ends it is deleted, for
    then what was made of the calls is stored; after an error or a kill it stays, and the same runs in the
    same order go on with it, to the same result. Of several parts each says its name first (`begin`).

    The functions of reads and edits go by their value and its call alone; a reduce that gathers says how it
    does (`part` and `add`). What reads get is written down too: reduce what is large. Runs with gradients,
    and denoisers with a cache, are computed as a whole.

    Raises: StoreError if the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} cannot be a folder of calls: {error.strerror or error}.") from None
    memory = FolderOfCalls(folder)
    try:
        with remembering(cast(Any, model).points, memory):  # Of either engine's model.
            yield memory
    except BaseException:
        with suppress(StoreError):  # What was written before stays.
            memory.flush()
        raise
    shutil.rmtree(folder, ignore_errors=True)
