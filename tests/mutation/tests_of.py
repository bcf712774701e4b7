"""Which tests can notice a change: those that run its lines, else those whose files import its module."""

from __future__ import annotations

import ast
import json
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


@dataclass(frozen=True)
class Lines:
    """The map that `cover` writes."""

    tests: Sequence[str]
    seconds: Sequence[float]
    lines: Mapping[str, Mapping[str, Sequence[int]]]
    at_import: Mapping[str, Sequence[int]]

    @classmethod
    def read(cls, path: Path | None) -> Lines:
        """A map, or an empty one."""
        if path is None:
            return cls((), (), {}, {})
        held: dict[str, Any] = json.loads(path.read_text())
        return cls(held["tests"], held["seconds"], held["lines"], held["at_import"])

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
            numbers = about | {n for of_line in by_line.values() for n in of_line}
        if numbers or module in self.lines:
            return sorted((self.tests[n] for n in self._spread(numbers)), key=self._seconds)
        return list(files_of(module)[:N_FILES])

    def _spread(self, numbers: set[int]) -> list[int]:
        by_name = {self.tests[n]: n for n in numbers}
        some = spread(list(by_name), {name: self.seconds[n] for name, n in by_name.items()})
        return [by_name[name] for name in some]

    def _seconds(self, name: str) -> tuple[float, str]:
        return self.seconds[self.tests.index(name)], name


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
