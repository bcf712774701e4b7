"""Which families' records fit a model best that none covers."""

from __future__ import annotations

import difflib
from typing import Any

from mm_adapters.records.registry import records
from mm_adapters.records.resolve import resolve_parts
from mm_adapters.records.spec import Tower
from mm_adapters.sites.draft import unnamed_block


def nearest(model: Any) -> str:
    """A sentence that names them, and says how many of the places they name are in the model's blocks; or "".

    Of those that fit alike, the ones whose classes are called most like it come first.
    """
    block = unnamed_block(model)
    if block is None:
        return ""
    fits: dict[str, tuple[int, int]] = {}
    for record in records():
        for stack in record.stacks.values() if isinstance(record, Tower) else ():
            fit = len(resolve_parts(stack.parts, block)), len(stack.parts)
            fits[record.name] = max(fits.get(record.name, (0, 1)), fit, key=_rank)
    n_present, total = max(fits.values(), key=_rank)
    if n_present / total < 0.4:
        return ""
    best = {name for name, fit in fits.items() if fit == (n_present, total)}
    called = {r.name: _alike(type(model).__name__, r) for r in records() if r.name in best}
    alike = sorted(best, key=lambda name: (-called[name], name))[:4]
    share = "all" if n_present == total else f"{n_present}"
    reason = f"{share} of the {total} places named in a block are in this model's"
    return f"The nearest {'is' if len(alike) == 1 else 'are'} {', '.join(map(repr, alike))}: {reason}."


def _rank(fit: tuple[int, int]) -> tuple[float, int]:
    n_present, total = fit
    return n_present / total, n_present


def _alike(called: str, record: Any) -> float:
    """How alike a class' name is to those of the record's classes, at best."""
    names = (c.partition(":")[2] for c in record.classes)
    return max((difflib.SequenceMatcher(None, called, n).ratio() for n in names), default=0.0)
