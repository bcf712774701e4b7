"""What a line of the table is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.methods.contract.given import Given
from tests.methods.contract.kinds import Kind

Call = Callable[[Any, Given], Any]


@dataclass(frozen=True)
class Method:
    """A public method, the kinds of families it is for, and a call that gives numbers to compare.

    `tolerance` is how far the engines may be apart, relatively, and `why` says why they are.
    """

    fn: Callable[..., Any]
    kinds: tuple[Kind, ...]
    call: Call
    tolerance: float = 0.0
    why: str = ""

    @property
    def name(self) -> str:
        """ "room.method"."""
        return f"{self.fn.__module__.split('.')[1]}.{self.fn.__name__}"


@dataclass(frozen=True)
class Reason:
    """A refusal that names no missing site or role: by patterns, which methods, families and message; why."""

    methods: str
    families: str
    message: str
    why: str

    def covers(self, method: str, name: str, error: Exception) -> bool:
        """Whether this is the reason of a refusal."""
        tests = ((self.methods, method), (self.families, name))
        return all(re.fullmatch(p, s) for p, s in tests) and bool(re.search(self.message, str(error)))
