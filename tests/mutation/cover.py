"""Which tests run which lines: the suite once under `coverage`, a context for each test, and a map of it.

    python -m tests.mutation.cover --out /tmp/lines.json [-n 2] [tests/test_store.py ...]

It takes little longer than the tests. As a pytest plugin (`-p tests.mutation.cover`) it writes the part of
one process. What a fixture of several tests runs counts for each test that asks for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.mutation.tree import PACKAGES, ROOT

# What runs while tests are collected: a family's record, a table.
IMPORT = ""
# Of each test function so many of its cases are kept for a line, and so many tests in all.
PER_FUNCTION, PER_LINE = 6, 600
# Tests of the runner itself, and of another library's code.
LEFT_OUT = ("tests/foreign/", "tests/mutation/")
_OUT = "MM_INTERP_LINES"


class Plugin:
    """The lines of each test and shared fixture of one process, and each test's seconds and fixtures."""

    def __init__(self, folder: Path) -> None:
        import coverage

        self.folder = folder
        self.name = os.environ.get("PYTEST_XDIST_WORKER", "alone")
        self.lines = coverage.Coverage(
            data_file=str(folder / f"{self.name}.coverage"),
            config_file=False,
            include=[f"{ROOT / package}/*" for package in PACKAGES],
            concurrency=["thread", "greenlet"],  # nnsight's blocks run in greenlets.
            messages=False,
        )
        self.context = IMPORT
        self.tests: dict[str, dict[str, Any]] = {}
        self.failed: set[str] = set()
        self.lines.start()

    @contextmanager
    def _in(self, context: str) -> Iterator[None]:
        before, self.context = self.context, context
        self.lines.switch_context(context)
        try:
            yield
        finally:
            self.context = before
            self.lines.switch_context(before)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        start = time.perf_counter()
        with self._in(item.nodeid):
            yield
        self.tests[item.nodeid] = {
            "seconds": round(time.perf_counter() - start, 2),
            "fixtures": list(getattr(item, "fixturenames", ())),
        }

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        if fixturedef.scope == "function":
            yield
            return
        with self._in(shared(fixturedef.argname, fixturedef.baseid)):
            yield

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.lines.stop()
        self.lines.save()
        passed = {name: one for name, one in self.tests.items() if name not in self.failed}
        (self.folder / f"{self.name}.json").write_text(json.dumps(passed))


def pytest_configure(config: pytest.Config) -> None:
    is_controller = bool(getattr(config.option, "numprocesses", None))
    if _OUT in os.environ and not is_controller:
        config.pluginmanager.register(Plugin(Path(os.environ[_OUT])))


def shared(name: str, below: str) -> str:
    """The context of a fixture of several tests: those below a file or folder that ask for it by name."""
    return f"@{name}@{below}"


def spread(tests: Sequence[str], seconds: Mapping[str, float]) -> list[str]:
    """Some of the tests: the quickest of each function's cases, functions in turn, the quickest first."""
    by_function: dict[str, list[str]] = {}
    for name in sorted(tests, key=lambda n: (seconds[n], n)):
        by_function.setdefault(name.partition("[")[0], []).append(name)
    turns = [
        [of_one[turn] for of_one in by_function.values() if len(of_one) > turn]
        for turn in range(PER_FUNCTION)
    ]
    return [name for turn in turns for name in turn][:PER_LINE]


def merged(
    tests: Mapping[str, Mapping[str, Any]], ran: Mapping[str, Mapping[int, set[str]]]
) -> dict[str, Any]:
    """The map: tests, the seconds of each, and by module and line which of them run it; and the lines that
    run when a module is imported.

    `tests` has each passed test's seconds and fixtures, `ran` by module and line the contexts that ran it.
    """
    askers: dict[str, set[str]] = {}
    for name, one in tests.items():
        for fixture in one["fixtures"]:
            askers.setdefault(fixture, set()).add(name)

    def tests_in(context: str) -> set[str]:
        if not context.startswith("@"):
            return {context} & tests.keys()
        _, fixture, below = context.split("@", 2)
        return {name for name in askers.get(fixture, ()) if name.startswith(below)}

    in_context: dict[str, set[str]] = {}
    for of_module in ran.values():
        for contexts in of_module.values():
            for context in contexts - in_context.keys():
                in_context[context] = tests_in(context)
    seconds = {name: float(one["seconds"]) for name, one in tests.items()}
    number = {name: i for i, name in enumerate(seconds)}
    lines: dict[str, dict[int, list[int]]] = {}
    for module, of_module in ran.items():
        for line, contexts in of_module.items():
            names = {name for context in contexts for name in in_context[context]}
            if names:
                kept = spread(sorted(names), seconds)
                lines.setdefault(module, {})[line] = [number[name] for name in kept]
    return {
        "tests": list(seconds),
        "seconds": list(seconds.values()),
        "at_import": {m: sorted(x for x, c in by.items() if IMPORT in c) for m, by in ran.items()},
        "lines": lines,
    }


def read(folder: Path) -> dict[str, Any]:
    """The map of what the processes of one run have written into a folder."""
    import coverage

    tests: dict[str, Any] = {}
    ran: dict[str, dict[int, set[str]]] = {}
    for part in sorted(folder.glob("*.json")):
        tests |= json.loads(part.read_text())
        data = coverage.CoverageData(str(part.with_suffix(".coverage")))
        data.read()
        for path in sorted(data.measured_files()):
            of_module = ran.setdefault(str(Path(path).relative_to(ROOT)), {})
            for line, contexts in data.contexts_by_lineno(path).items():
                of_module.setdefault(line, set()).update(contexts)
    return merged(tests, ran)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=2, help="processes")
    parser.add_argument("files", nargs="*")
    options = parser.parse_args(argv)
    left_out = [f"--ignore={ROOT / folder}" for folder in LEFT_OUT]
    chosen = ["-n", str(options.n), "--dist", "loadfile", "-m", "not ndif and not slow", *left_out]
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {_OUT: folder, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.mutation.cover", *chosen]
        code = subprocess.run([*command, *options.files], cwd=ROOT, env=environment, check=False).returncode
        held = read(Path(folder))
    options.out.write_text(json.dumps(held))
    print(f"{len(held['tests'])} tests, {sum(map(len, held['lines'].values()))} lines")
    return code


if __name__ == "__main__":
    sys.exit(main())
