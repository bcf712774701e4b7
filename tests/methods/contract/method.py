"""What a line of the table is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tests.methods.contract.given import Given
from tests.methods.contract.kinds import Kind

Call = Callable[[Any, Given], Any]


@dataclass(frozen=True)
class Method:
    """A public method, the kinds of families it is for, and a call that gives numbers to compare.

    `before` makes what the call is given as `Given.ready`; its own work does not count.
    `tolerance` is how far the engines may be apart, relatively, and `why` says why they are.
    """

    fn: Callable[..., Any]
    kinds: tuple[Kind | Literal["trained", "streamed"], ...]
    call: Call
    before: Call | None = None
    tolerance: float = 0.0
    why: str = ""

    @property
    def name(self) -> str:
        """ "room.method"."""
        return f"{self.fn.__module__.split('.')[1]}.{self.fn.__name__}"


@dataclass(frozen=True)
class Reason:
    """A refusal that names no missing site or role: patterns of its methods and its message, and why it is.

    `holds` tells from the model, its inputs and what the message says whether that is so.
    """

    methods: str
    message: str
    why: str
    holds: Callable[[Given, re.Match[str]], bool]

    def covers(self, method: str, given: Given, error: Exception) -> bool:
        """Whether this is the reason of a refusal, and the record or the inputs say so."""
        said = re.search(self.message, str(error))
        return bool(re.fullmatch(self.methods, method)) and said is not None and self.holds(given, said)
