"""Numbers of rows, positions, steps and calls as a user gives them, made a tuple that can be read twice."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
from torch import Tensor

from mm_adapters._errors import InputError

Rows = Literal["all", "cond", "uncond", "image", "perturbed"] | slice | Sequence[int]

_MOST = 1_000_000


def whole_numbers(what: str, given: Any) -> tuple[int, ...]:
    """The numbers in a list, range, set, generator, array or tensor, or one number alone.

    Raises: InputError if there is none, or one is not a whole number. `what` names them in the error.
    """
    if isinstance(given, Tensor | np.ndarray):
        given = given.tolist()
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        given = [given]
    listed = list(islice(given, _MOST + 1))
    if len(listed) > _MOST:
        raise InputError(f"{what}: more than {_MOST:,} numbers were given.")
    if not listed:
        raise InputError(f"{what} is empty: give at least one number, or leave it out for all.")
    if isinstance(given, set | frozenset):
        listed.sort(key=str)
    return tuple(_whole(what, number) for number in listed)


def counted_from_zero(what: str, given: Any) -> tuple[int, ...] | None:
    """As `whole_numbers`, of things that count from 0; None, for all of them, stays None.

    Raises: InputError for a negative number.
    """
    if given is None:
        return None
    numbers = whole_numbers(what, given)
    if min(numbers) < 0:
        raise InputError(f"{what} holds {min(numbers)}: {what.rpartition(' ')[2]} count from 0.")
    return numbers


def row_numbers(what: str, given: Any) -> Rows:
    """A name or a slice as it is, numbers as a tuple. Raises: InputError for what can be no rows."""
    if isinstance(given, str):
        return given  # type: ignore[return-value]
    if isinstance(given, slice):
        for bound in (given.start, given.stop, given.step):
            if bound is not None:
                _whole(what, bound)
        return given
    return whole_numbers(what, given)


def rows_among(what: str, rows: slice | tuple[int, ...], n: int) -> slice | list[int]:
    """What to index `n` rows with; negative numbers count from the last.

    Raises: InputError naming the rows that are not among them, or if that is none.
    """
    if isinstance(rows, tuple):
        return within(what, rows, n, "row")
    bounds = [b for b in (rows.start, rows.stop) if b is not None]
    too_far = [b for b in bounds if not -n <= b <= n]
    if too_far or not range(*rows.indices(n)):
        shown = f"{'' if rows.start is None else rows.start}:{'' if rows.stop is None else rows.stop}"
        raise InputError(
            f"{what}: rows {shown} are not all there, for the batch has {n} row{'s' * (n != 1)} here."
        )
    return rows


def within(what: str, numbers: tuple[int, ...], n: int, of: str) -> list[int]:
    """The numbers counted from 0 among `n`; negative ones count from the last.

    Raises: InputError naming those that are not there.
    """
    missing = [i for i in numbers if not -n <= i < n]
    if missing:
        raise InputError(
            f"{what}: there is no {of} {', '.join(map(str, missing))}. There are {n} here, counted from 0."
        )
    return [i % n for i in numbers]


def _whole(what: str, number: Any) -> int:
    kind = getattr(number, "dtype", None)
    is_flag = isinstance(number, bool | np.bool_) or "bool" in str(kind)
    try:
        return operator.index("flag" if is_flag else number)  # type: ignore[arg-type]
    except (TypeError, RuntimeError, ValueError):
        raise InputError(f"{what} holds {number!r}, which is no whole number.") from None
