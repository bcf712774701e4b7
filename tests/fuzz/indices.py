"""Rows, positions and steps of every type that a caller may give, with what each of them means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import numpy as np
import torch

Sort = Literal["rows", "positions", "steps"]


@dataclass(frozen=True)
class Index:
    """`make` gives the argument anew (a generator is used up), `means` the numbers it stands for.

    `means` is None where it stands for none. `or_refused`: a refusal is right too.
    """

    text: str
    make: Callable[[], Any]
    means: tuple[int, ...] | None
    or_refused: bool = False


def valid(rng: Random, n: int, sort: Sort) -> Index:
    """An index of `n` things that are all there."""
    some = tuple(sorted(rng.sample(range(n), rng.randint(1, min(n, 3)))))
    one, first = rng.randrange(n), rng.randint(1, n)
    forms = [
        _index(f"{list(some)}", lambda: list(some), some),
        _index(f"{some}", lambda: some, some),
        _index(f"range({first})", lambda: range(first), tuple(range(first))),
        _index(f"(i for i in {list(some)})", lambda: (i for i in some), some),
        _index(f"torch.tensor({list(some)})", lambda: torch.tensor(some), some),
        _index(f"np.array({list(some)})", lambda: np.array(some), some),
        _index(f"[np.int64({one})]", lambda: [np.int64(one)], (one,)),
        _index(f"[torch.tensor({one})]", lambda: [torch.tensor(one)], (one,), True),
        _index(f"iter({list(some)})", lambda: iter(some), some),
    ]
    if sort == "steps":
        forms += [
            _index(f"{set(some)}", lambda: set(some), some),
            _index("[-1]", lambda: [-1], (n - 1,), True),
        ]
    if sort == "positions":
        pair = tuple(sorted({one, n - 1}))
        forms += [
            _index("[-1]", lambda: [-1], (n - 1,), True),
            _index(f"[{-n}]", lambda: [-n], (0,), True),
            _index(f"[{one}, -1]", lambda: list(dict.fromkeys([one, -1])), pair, True),
        ]
    if sort == "rows":
        start = rng.randrange(n)
        forms += [
            _index("[-1]", lambda: [-1], (n - 1,)),
            _index(f"slice({start}, None)", lambda: slice(start, None), tuple(range(start, n))),
            _index("slice(-1, None)", lambda: slice(-1, None), (n - 1,)),
            _index(f"slice(0, {first})", lambda: slice(0, first), tuple(range(first))),
            _index("slice(None, None, 2)", lambda: slice(None, None, 2), tuple(range(0, n, 2))),
            _index(f"{list(reversed(some))}", lambda: list(reversed(some)), tuple(reversed(some))),
        ]
    return rng.choice(forms)


def unsure(rng: Random, n: int, sort: Sort) -> Index:
    """An index that may be taken as it is meant, or refused."""
    one = rng.randrange(n)
    forms = [
        _index(f"{one}", lambda: one, (one,), True),
        _index("np.int64(0)", lambda: np.int64(0), (0,), True),
    ]
    if sort != "rows":
        forms.append(_index("slice(0, 1)", lambda: slice(0, 1), (0,), True))
    else:
        forms.append(_index(f"slice(0, {n + 3})", lambda: slice(0, n + 3), tuple(range(n)), True))
    return rng.choice(forms)


def bad(rng: Random, n: int, sort: Sort) -> Index:
    """An index of nothing, of what is not there, wholly or in part, or of no whole numbers."""
    far = n + rng.choice([0, 1, 7, 500])
    forms: list[tuple[str, Callable[[], Any]]] = [
        ("[]", list),
        ("()", tuple),
        ("range(0)", lambda: range(0)),
        ("(i for i in [])", lambda: iter(())),
        ("torch.tensor([])", lambda: torch.tensor([], dtype=torch.long)),
        (f"[{far}]", lambda: [far]),
        (f"[0, {far}]", lambda: [0, far]),
        (f"(0, {far})", lambda: (0, far)),
        (f"range({far + 1})", lambda: range(far + 1)),
        (f"torch.tensor([0, {far}])", lambda: torch.tensor([0, far])),
        (f"np.array([{far}])", lambda: np.array([far])),
        (f"(i for i in [0, {far}])", lambda: (i for i in [0, far])),
        (f"[{-far - 1}]", lambda: [-far - 1]),
        ("[0.0]", lambda: [0.0]),
        ("[1.5]", lambda: [1.5]),
        ("[0, 0.5]", lambda: [0, 0.5]),
        ("torch.tensor([0.0])", lambda: torch.tensor([0.0])),
        ("np.array([0.5])", lambda: np.array([0.5])),
        ("[float('nan')]", lambda: [float("nan")]),
        ("[True]", lambda: [True]),
        ("[False, True]", lambda: [False, True]),
        ("torch.tensor([True])", lambda: torch.tensor([True])),
        ("['0']", lambda: ["0"]),
        ("'foo'", lambda: "foo"),
        ("[None]", lambda: [None]),
        ("[[0]]", lambda: [[0]]),
        ("object()", object),
        ("0.5", lambda: 0.5),
    ]
    if sort == "rows":
        forms += [
            (f"slice({n}, None)", lambda: slice(n, None)),
            ("slice(1, 1)", lambda: slice(1, 1)),
            ("slice(0.0, 1)", lambda: slice(0.0, 1)),
            ("'Cond'", lambda: "Cond"),
        ]
    text, make = rng.choice(forms)
    return _index(text, make, None)


def _index(
    text: str, make: Callable[[], Any], means: tuple[int, ...] | None, or_refused: bool = False
) -> Index:
    return Index(text, make, means, or_refused)
