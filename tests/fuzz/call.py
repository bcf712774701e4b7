"""One generated call: what is done, and what is right about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Any

from tests.fuzz.subjects import Subject


class Expect(Enum):
    VALUE = "the right value"
    REFUSAL = "an error of the package's own"
    EITHER = "the right value, or an error of the package's own"
    OWN_ERROR = "the error that the caller's own function raised"


class Mine(Exception):
    """What a caller's function raises in a generated call."""


class Stop(BaseException):
    """As when a user presses Ctrl-C: no `except Exception` catches it."""


@dataclass(frozen=True)
class OneOf:
    """Right answers of which one has to come."""

    answers: tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """`perform` does it, `right` computes the same on the library's own model.

    Both give values by name. `only_run_shows`: that the call is bad is seen only while it runs, so that an
    error after the first module is as early as it can be.
    """

    kind: str
    text: str
    expect: Expect
    subject: Subject
    perform: Callable[[], dict[str, Any]]
    right: Callable[[], dict[str, Any]] = dict
    only_run_shows: bool = False
    index: int = -1

    def line(self) -> str:
        return f"{self.kind} · {self.subject.name}/{self.subject.engine} · {self.text}"


@dataclass(frozen=True)
class Kind:
    """A kind of call: what makes one, for which subjects, and how often it comes."""

    make: Callable[[Random, Subject], Call]
    fits: Callable[[Subject], bool] = field(default=lambda subject: True)
    weight: float = 1.0
