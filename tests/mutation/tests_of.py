"""Which tests can notice a change: those that run its lines, else those whose files import its module."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.import_graph import graph_of, imported, modules_of
from tests.mutation.changes import Change
from tests.mutation.cover import LEFT_OUT, spread
from tests.mutation.tree import PACKAGES, ROOT

N_FILES = 6  # Where no map says which tests run a line.
SECONDS, MOST = 30.0, 60  # So long the tests of one change may take in all, by the map; so many there are.

# Notices an argument's default, which is made at import.
PUBLIC = "tests/test_public_api.py::"


def within_time(module: str, seconds: Mapping[str, float]) -> list[str]:
    """A spread of tests that takes no longer than `SECONDS`, but at least one: first those by whose name it
    is about the module, then the others.
    """
    about = words_of(module)
    kin = [n for n in seconds if about & words_of(n.partition("[")[0]) or n.startswith(PUBLIC)]
    chosen: list[str] = []
    left = SECONDS
    for name in (*spread(kin, seconds), *spread(sorted(seconds.keys() - set(kin)), seconds)):
        if len(chosen) < MOST and (seconds[name] <= left or not chosen):
            chosen.append(name)
            left -= seconds[name]
    return chosen


def words_of(path: str) -> set[str]:
    """The words of a path that tell one module or test from another."""
    words = {word.removesuffix("s") for word in re.split(r"[\W_]+", path.lower())}
    return words - {"", "a", "and", "i", "in", "it", "mm", "no", "of", "on", "or", "py", "test", "the", "to",
                    "adapter", "integration", "method", "multimodal"}  # fmt: skip


@dataclass(frozen=True)
class Lines:
    """The map that `cover` writes."""

    tests: Sequence[str]
    seconds: Sequence[float]
    lines: Mapping[str, Mapping[str, Sequence[int]]]
    at_import: Mapping[str, Sequence[int]]

    @classmethod
    def read(cls, *paths: Path) -> Lines:
        """What some maps hold together: that of all tests, say, and those of tests written since."""
        tests: list[str] = []
        seconds: list[float] = []
        lines: dict[str, dict[str, list[int]]] = {}
        at_import: dict[str, set[int]] = {}
        for path in paths:
            held: dict[str, Any] = json.loads(path.read_text())
            for module, of_module in held["lines"].items():
                mine = lines.setdefault(module, {})
                for line, numbers in of_module.items():
                    mine.setdefault(line, []).extend(len(tests) + n for n in numbers)
            for module, at in held["at_import"].items():
                at_import.setdefault(module, set()).update(at)
            tests += held["tests"]
            seconds += held["seconds"]
        return cls(tests, seconds, lines, {module: sorted(at) for module, at in at_import.items()})

    def of(self, module: str, change: Change) -> list[str]:
        """The tests that can notice a change, the quickest first: those that run a line of its statement.

        What runs at import is noticed by whom a record is about: by tests with the module's name among
        their parameters, and by those that run other lines of it. Without a map, the nearest test files.
        """
        by_line = self.lines.get(module, {})
        first, last = change.lines
        numbers = {n for line in range(first, last + 1) for n in by_line.get(str(line), ())}
        if not numbers and set(range(first, last + 1)) & set(self.at_import.get(module, ())):
            stem = module.rpartition("/")[2].removesuffix(".py").strip("_")
            about = {n for n, name in enumerate(self.tests) if stem in name.partition("[")[2]}
            listed = {n for n, name in enumerate(self.tests) if name.startswith(PUBLIC)}
            numbers = about | listed | {n for of_line in by_line.values() for n in of_line}
        if numbers or module in self.lines:
            return within_time(module, {self.tests[n]: self.seconds[n] for n in numbers})
        return list(files_of(module)[:N_FILES])


@cache
def files_of(module: str) -> tuple[str, ...]:
    """The test files that import a module: itself, or through one, two, ... others; the nearest first."""
    dotted = module.removesuffix(".py").replace("/", ".")
    known = {name: path for package in PACKAGES for name, path in modules_of(package).items()}
    graph = {name: others for package in PACKAGES for name, others in graph_of(package).items()}
    for name in known:  # What a package's __init__ gives counts as its own.
        graph[name] = graph[name] | {
            n for path in [known[name]] for n, _ in imported(ast.parse(path.read_text()), known) if n in known
        } - {name}
    by_file = {
        str(path.relative_to(ROOT)): {
            n for n, _ in imported(ast.parse(path.read_text()), known) if n in known
        }
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if not str(path.relative_to(ROOT)).startswith(LEFT_OUT)
    }
    found: list[tuple[int, str]] = []
    for test_file, starts in by_file.items():
        seen, front, steps = set(starts), set(starts), 0
        while front and dotted not in seen:
            front = {n for name in front for n in graph[name]} - seen
            seen |= front
            steps += 1
        if dotted in seen:
            found.append((steps, test_file))
    return tuple(name for _, name in sorted(found))
