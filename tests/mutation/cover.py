"""Which tests run which lines: every test file once, under a trace function, and a map of what it ran.

python -m tests.mutation.cover --out /tmp/lines.json [tests/test_store.py ...]

Goes on with a map that is there: files that it has are not run again, unless they are named. It takes about
twice as long as the tests. As a pytest plugin (`-p tests.mutation.cover`) it writes one file's part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.mutation.tree import PACKAGES, ROOT

# What runs while tests are collected: a family's record, a table.
IMPORT = ""
# Of each test function so many of its cases are kept for a line, and so many tests in all.
PER_FUNCTION, PER_LINE = 2, 60
# Tests of the runner itself, and of another library's code.
LEFT_OUT = ("tests/foreign/", "tests/mutation/")
_OUT = "MM_INTERP_LINES"


class Tracer:
    """Notes the lines of our packages that run, file by file."""

    def __init__(self) -> None:
        self.prefixes = tuple(str(ROOT / package) + os.sep for package in PACKAGES)
        self.lines: dict[str, set[int]] = {}
        self._known: dict[str, str | None] = {}

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        path = frame.f_code.co_filename
        if path not in self._known:
            is_ours = path.startswith(self.prefixes)
            self._known[path] = str(Path(path).relative_to(ROOT)) if is_ours else None
        module = self._known[path]
        if module is None:
            return None
        seen = self.lines.setdefault(module, set())
        seen.add(frame.f_lineno)

        def line(inner: FrameType, what: str, value: Any) -> Any:
            if what == "line":
                seen.add(inner.f_lineno)
            return line

        return line


class Plugin:
    """For each test that passes: its lines, and its seconds."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.tracer = Tracer()
        self.tests: dict[str, dict[str, Any]] = {}
        self.failed: set[str] = set()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_collection(self) -> Iterator[None]:
        yield from self._traced(IMPORT)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        yield from self._traced(item.nodeid)

    def _traced(self, name: str) -> Iterator[None]:
        self.tracer.lines = {}
        start = time.perf_counter()
        sys.settrace(self.tracer)
        threading.settrace(self.tracer)
        try:
            yield
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
        lines = {module: sorted(seen) for module, seen in self.tracer.lines.items()}
        self.tests[name] = {"seconds": round(time.perf_counter() - start, 2), "lines": lines}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        passed = {name: one for name, one in self.tests.items() if name not in self.failed}
        self.out.write_text(json.dumps(passed))


def pytest_configure(config: pytest.Config) -> None:
    if _OUT in os.environ:
        config.pluginmanager.register(Plugin(Path(os.environ[_OUT])))


def spread(tests: Sequence[str], seconds: dict[str, float]) -> list[str]:
    """Some of the tests: the quickest of each function's cases, functions in turn, the quickest first."""
    by_function: dict[str, list[str]] = {}
    for name in sorted(tests, key=lambda n: (seconds[n], n)):
        by_function.setdefault(name.partition("[")[0], []).append(name)
    turns = [
        [of_one[turn] for of_one in by_function.values() if len(of_one) > turn]
        for turn in range(PER_FUNCTION)
    ]
    return [name for turn in turns for name in turn][:PER_LINE]


def merged(parts: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """The map of all test files: tests, the seconds of each, and by module and line which of them run it;
    and the lines that run when a module is imported.
    """
    at_import: dict[str, set[int]] = {}
    for tests in parts.values():
        for module, lines in tests.get(IMPORT, {"lines": {}})["lines"].items():
            at_import.setdefault(module, set()).update(lines)
    parts = {name: {n: one for n, one in tests.items() if n != IMPORT} for name, tests in parts.items()}
    seconds = {name: one["seconds"] for tests in parts.values() for name, one in tests.items()}
    by_line: dict[str, dict[int, list[str]]] = {}
    for tests in parts.values():
        for name, one in tests.items():
            for module, lines in one["lines"].items():
                of_module = by_line.setdefault(module, {})
                for line in lines:
                    of_module.setdefault(line, []).append(name)
    kept = {m: {line: spread(names, seconds) for line, names in by.items()} for m, by in by_line.items()}
    used = sorted({name for by in kept.values() for names in by.values() for name in names})
    number = {name: i for i, name in enumerate(used)}
    return {
        "tests": used,
        "seconds": [seconds[name] for name in used],
        "at_import": {module: sorted(lines) for module, lines in at_import.items()},
        "lines": {m: {x: [number[n] for n in names] for x, names in by.items()} for m, by in kept.items()},
    }


def run_file(test_file: str) -> dict[str, Any]:
    """One test file under the trace function, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        environment = os.environ | {_OUT: str(out), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "tests.mutation.cover",
            "-m",
            "not ndif and not slow",
        ]
        subprocess.run([*command, test_file], cwd=ROOT, env=environment, capture_output=True, check=False)
        return json.loads(out.read_text()) if out.is_file() else {}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("files", nargs="*")
    options = parser.parse_args(argv)
    folder = options.out.with_suffix(".parts")
    folder.mkdir(parents=True, exist_ok=True)
    every = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py"))
    names = options.files or [n for n in every if not n.startswith(LEFT_OUT)]
    for name in names:
        part = folder / f"{name.replace('/', '.')}.json"
        if part.is_file() and not options.files:
            continue
        start = time.perf_counter()
        tests = run_file(name)
        part.write_text(json.dumps({name: tests}))
        print(
            f"{name}: {len(tests.keys() - {IMPORT})} tests, {time.perf_counter() - start:.0f} s", flush=True
        )
    parts: dict[str, Any] = {}
    for part in sorted(folder.glob("*.json")):
        parts |= json.loads(part.read_text())
    options.out.write_text(json.dumps(merged(parts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
