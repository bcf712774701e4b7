"""What applies to a tower, what passes with one, and whether the failures are the ones that are listed."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from foreign.transformer_lens.run import Outcome

LISTS = Path(__file__).parent


@dataclass(frozen=True)
class Listed:
    """Tests (a pattern of ids) that fail, or lie outside, with the reason. `says` is what a failure says."""

    tests: str
    why: str
    says: str = ""


@dataclass(frozen=True)
class Comparison:
    """One comparison of the two runs. Names are ids of tests.

    Args:
        applicable: Pass with TransformerLens' object over what is served, reach it, and lie not outside.
        passed: Of these, pass with a tower and reach it.
        failed: The others of these, with what came of them.
        outside: Would apply, but are about what a tower is not.
        skipped: Skipped with a tower: the reasons, counted.
    """

    applicable: list[str]
    passed: list[str]
    failed: dict[str, str]
    outside: list[str]
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Passed of the applicable."""
        return len(self.passed) / max(1, len(self.applicable))

    def by_file(self) -> dict[str, tuple[int, int]]:
        """Passed and applicable, of each file."""
        passed, all_of = Counter(map(_file, self.passed)), Counter(map(_file, self.applicable))
        return {file: (passed[file], all_of[file]) for file in sorted(all_of)}


def compare(
    theirs: Mapping[str, Outcome], ours: Mapping[str, Outcome], outside: Iterable[Listed] = ()
) -> Comparison:
    """Judges the run with towers by the run with TransformerLens' own objects."""
    reached = sorted(t for t, o in theirs.items() if o.outcome == "passed" and o.reaches)
    beyond = [t for t in reached if any(_covers(row, t) for row in outside)]
    applicable = [t for t in reached if t not in set(beyond)]
    what_came = {test: _what_came(test, ours) for test in applicable}
    return Comparison(
        applicable=applicable,
        passed=[test for test, came in what_came.items() if came == "passed"],
        failed={test: came for test, came in what_came.items() if came != "passed"},
        outside=beyond,
        skipped=Counter(_reason(o.says) for o in ours.values() if o.outcome == "skipped"),
    )


def complaints(found: Comparison, exceptions: Iterable[Listed], whole: bool) -> list[str]:
    """Failures that are not listed, or say something else, and listed ones that pass or are not there.

    `whole`: all files were run, so that each row of the list must be met.
    """
    rows = list(exceptions)
    lines = []
    for test, says in found.failed.items():
        row = next((row for row in rows if _covers(row, test)), None)
        if row is None:
            lines.append(f"{test} fails: {says}")
        elif not re.search(row.says, says, re.DOTALL):
            lines.append(f"{test} fails in another way than listed ({row.says}): {says}")
    for row in rows:
        met = [test for test in found.applicable if _covers(row, test)]
        passing = [test for test in met if test not in found.failed]
        lines += [f"{test} passes now: it is an exception no more." for test in passing]
        if whole and not met:
            lines.append(f"{row.tests} is listed and no test that applies.")
    return lines


def read_list(name: str) -> list[Listed]:
    """The rows of exceptions.toml or outside.toml."""
    rows = tomllib.loads((LISTS / f"{name}.toml").read_text(encoding="utf-8"))
    return [Listed(**row) for row in rows.get(name, [])]


def _covers(row: Listed, test: str) -> bool:
    pattern = re.sub(r"\[", "[[]", f"tests/{row.tests}")  # The brackets of a parameter are itself.
    return fnmatchcase(test, pattern)


def _what_came(test: str, ours: Mapping[str, Outcome]) -> str:
    if test not in ours:
        imported = ours.get(_file(test))
        return f"its file cannot be imported: {imported.says}" if imported else "it was not run"
    outcome = ours[test]
    if outcome.outcome == "passed":
        return "passed" if outcome.reaches else "it passes without reaching a tower"
    return f"{outcome.outcome}: {outcome.says} ({outcome.where})"


def _file(test: str) -> str:
    return test.partition("::")[0]


def _reason(says: str) -> str:
    return says.rpartition("Skipped: ")[2].strip("')\"")[:120]
