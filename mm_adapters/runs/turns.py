"""One run at a time on a model: another thread's waits, and one inside a run finds the model as it was.

A turn belongs to a module, and all that wrap the module share it. It is taken while hooks are on; while the
module runs, it has watchers.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, TypeVar, cast

from mm_adapters._errors import ModelBusyError
from mm_adapters.hooks.set_aside import loop_set_aside

Method = TypeVar("Method", bound=Callable[..., Any])
# A thread that has the model may wait for the one that waits for it, or keep hooks on and run nothing.
BLOCKED_S = 10.0
IDLE_S = 60.0


class Watcher(Protocol):
    """What an engine has on a model while it runs."""

    def set_aside(self) -> AbstractContextManager[None]:
        """The model is as if nothing were on it inside."""
        ...


def in_turn(method: Method) -> Method:
    """A method of a model, run in its `turn()`."""

    @functools.wraps(method)
    def taken(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.turn():
            return method(self, *args, **kwargs)

    return cast(Method, taken)


class Turn:
    """Who may run one module. `watchers` are on it in the run that is under way, the innermost last."""

    def __init__(self) -> None:
        self.thread: int | None = None
        self.depth = 0
        self.watchers: list[Watcher] = []
        self.outer: list[Watcher] = []

    def is_blocked(self) -> bool:
        """Whether the thread that has it waits for another thread, or is no more."""
        frame = sys._current_frames().get(self.thread or 0)
        return frame is None or frame.f_code.co_filename == threading.__file__


class Turns:
    """The turns of a model's modules, taken together.

    Args:
        modules: The modules and pipelines that a run of the model may run.
    """

    def __init__(self, modules: Iterable[Any]) -> None:
        self._modules = list({id(m): m for m in modules}.values())
        self._turns = [_turn_of(m) for m in self._modules]

    def __reduce__(self) -> Any:
        return Turns, (self._modules,)  # Of a copied model, those of the copied modules.

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """No other thread runs the model inside; says whether this thread had not taken it already.

        Inside a run of this thread, what that run has on the model is set aside.

        Raises: ModelBusyError if another thread keeps the model without running it, or waits for this one.
        """
        me = threading.get_ident()
        first = self._take(me)
        try:
            busy = list({id(w): w for turn in self._turns for w in turn.watchers}.values())
            if not busy:
                yield first
                return
            with ExitStack() as stack:
                for watcher in reversed(busy):
                    stack.enter_context(watcher.set_aside())
                for pipeline in (m for m in self._modules if hasattr(m, "components")):
                    stack.enter_context(loop_set_aside(pipeline))
                frames = [(turn.watchers, turn.outer) for turn in self._turns]
                for turn in self._turns:
                    turn.watchers, turn.outer = [], turn.outer + turn.watchers
                try:
                    yield True
                finally:
                    for turn, frame in zip(self._turns, frames, strict=True):
                        turn.watchers, turn.outer = frame
        finally:
            self._release()

    @contextmanager
    def running(self, watcher: Watcher) -> Iterator[None]:
        """The model runs inside, with `watcher` on it."""
        for turn in self._turns:
            turn.watchers = [*turn.watchers, watcher]
        try:
            yield
        finally:
            for turn in self._turns:
                turn.watchers = turn.watchers[:-1]

    def check_free(self, watcher: Watcher, what: str) -> None:
        """Raises: ModelBusyError if `watcher` is on the model in a run of this thread that is under way."""
        if any(watcher in (*turn.watchers, *turn.outer) for turn in self._turns if turn.thread == _me()):
            raise ModelBusyError(
                f"{what} inside a run of the same model: one of its edits, reads or hooks started "
                "another. Run what you need before, and use the result inside; or give the inner run a "
                "model of its own."
            )

    def _take(self, me: int) -> bool:
        with _TABLE.changed:
            if any(turn.thread not in (None, me) for turn in self._turns):
                _TABLE.wait_for(self._turns, me)
            first = not any(turn.depth for turn in self._turns)
            for turn in self._turns:
                turn.thread, turn.depth = me, turn.depth + 1
        return first

    def _release(self) -> None:
        with _TABLE.changed:
            for turn in self._turns:
                turn.depth -= 1
                if not turn.depth:
                    turn.thread = None
            _TABLE.changed.notify_all()


class _Table:
    """The turn of each module, and which threads wait for which."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.turns: weakref.WeakKeyDictionary[Any, Turn] = weakref.WeakKeyDictionary()
        self.waiting: dict[int, list[Turn]] = {}

    def wait_for(self, wanted: list[Turn], me: int) -> None:
        """Returns, with the condition held, when no other thread has a wanted turn."""
        self.waiting[me] = wanted
        since_free = since_busy = time.monotonic()
        try:
            while held := [turn for turn in wanted if turn.thread not in (None, me)]:
                now = time.monotonic()
                since_free = since_free if all(turn.is_blocked() for turn in held) else now
                since_busy = since_busy if not any(turn.watchers for turn in held) else now
                too_long = now - since_free > BLOCKED_S or now - since_busy > IDLE_S
                if too_long or self._waits_for(held, me):
                    raise ModelBusyError(
                        "Another thread has this model in a run or in model.hooks(...), and does not go "
                        "on: it may wait for this one. Let it end first, or load a second model for this "
                        "thread."
                    )
                self.changed.wait(timeout=0.5)
        finally:
            del self.waiting[me]

    def _waits_for(self, held: list[Turn], me: int) -> bool:
        seen: set[int] = set()
        threads = {turn.thread for turn in held if turn.thread is not None}
        while threads - seen:
            thread = (threads - seen).pop()
            seen.add(thread)
            threads |= {t.thread for t in self.waiting.get(thread, ()) if t.thread is not None}
        return me in seen

    def forget_threads(self) -> None:
        """In a forked child, only the thread that forked is there."""
        self.changed = threading.Condition()
        self.waiting = {}
        for turn in self.turns.values():
            if turn.thread != _me():
                turn.thread, turn.depth, turn.watchers, turn.outer = None, 0, [], []


def _me() -> int:
    return threading.get_ident()


def _turn_of(module: Any) -> Turn:
    with _TABLE.changed:
        return _TABLE.turns.setdefault(module, Turn())


# Locks cannot stand on the model: it is copied, pickled and shared by its wrappers.
_TABLE = _Table()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_TABLE.forget_threads)
