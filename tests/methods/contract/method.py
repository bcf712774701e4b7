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

    `tolerance` is how far the engines may be apart, relatively, and `why` says why they are.
    """

    fn: Callable[..., Any]
    kinds: tuple[Kind | Literal["trained"], ...]
    call: Call
    tolerance: float = 0.0
    why: str = ""

    @property
    def name(self) -> str:
        """ "room.method"."""
        return f"{self.fn.__module__.split('.')[1]}.{self.fn.__name__}"


@dataclass(frozen=True)
class Reason:
    """A refusal that names no missing site or role: patterns of its methods and its message, and why it is.

    `holds` tells from the model and what the message says whether that is so.
    """

    methods: str
    message: str
    why: str
    holds: Callable[[Any, re.Match[str]], bool]

    def covers(self, method: str, model: Any, error: Exception) -> bool:
        """Whether this is the reason of a refusal, and the record of the model says so."""
        said = re.search(self.message, str(error))
        return bool(re.fullmatch(self.methods, method)) and said is not None and self.holds(model, said)
