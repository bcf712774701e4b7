"""Makes changes one at a time and says which of them no test noticed: see the package's own words.

python -m tests.mutation.run --n 90 --seed 1 [--lines /tmp/lines.json] [--only data_attribution]
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.mutation.changes import Change, changes_of
from tests.mutation.tests_of import Lines
from tests.mutation.tree import PACKAGES, ROOT, Copy, fingerprint, modules

WANTED, MOST_EQUIVALENT = 0.95, 0.10
# Where the tests of a change are cut; how much longer than for the map they may take on a busy machine.
STAGES, SLOWER = (15, 30), 6.0
# What a real service runs is noticed by the tests of one, with `--ndif`; they take minutes.
SERVICE, SERVICE_SECONDS = "tests/ndif", 900.0
OF_THE_SERVICE = (
    "integrations/ndif/",
    "mm_adapters/ndif_client/",
    "mm_adapters/nnsight_engine/raw_values",
    "mm_adapters/nnsight_engine/recorder",
)
EQUIVALENTS = Path(__file__).parent / "equivalents.txt"


@dataclass(frozen=True)
class Drawn:
    """A change of a module."""

    module: str
    change: Change

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.change.old, self.change.new))
        return f"{self.module}:{self.change.lines[0]}  {self.change.kind}: {old} -> {new}"

    @property
    def key(self) -> str:
        """What names it in `equivalents.txt`: no line number, so that it lasts."""
        return str(self).replace(f":{self.change.lines[0]}  ", "  ", 1)


def draw(n: int, seed: int, paths: Sequence[str], root: Path = ROOT) -> list[Drawn]:
    """`n` different changes: modules weighted by their lines, in each a kind of change, then one of it."""
    lots = random.Random(seed)
    sources = {path: (root / path).read_text() for path in paths}
    changes = {path: changes_of(source) for path, source in sources.items()}
    known = [path for path in paths if changes[path]]
    weights = [sources[path].count("\n") for path in known]
    if n > sum(map(len, changes.values())):
        raise ValueError(f"There are fewer than {n} changes.")
    drawn: dict[Drawn, None] = {}
    while len(drawn) < n:
        (path,) = lots.choices(known, weights)
        kinds = sorted({change.kind for change in changes[path]})
        kind = lots.choice(kinds)
        drawn[Drawn(path, lots.choice([c for c in changes[path] if c.kind == kind]))] = None
    return list(drawn)


def equivalents(path: Path = EQUIVALENTS) -> dict[str, str]:
    """The changes that change nothing a user could see, each with its reason (a line: KEY  # REASON)."""
    lines = (line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#"))
    pairs = (line.partition("  # ") for line in lines)
    return {key.strip(): reason.strip() for key, _, reason in pairs}


def forked(work: Callable[[], int], seconds: float, said: Path) -> int | None:
    """The exit code of some work in a child process, None if it took too long; it writes to `said`."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            with said.open("wb") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            code = work()
        except BaseException:  # noqa: BLE001  A child must not go on with its parent's work.
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def stages(tests: list[str]) -> list[list[str]]:
    """The tests in turn: most changes are noticed by the first few, and the others need not be imported."""
    last = len(tests) - (tests[-1:] == [SERVICE])
    bounds = [0, *(stop for stop in STAGES if stop < last), last, len(tests)]
    return [some for start, stop in pairwise(bounds) if (some := tests[start:stop])]


class Judge:
    """Runs tests in a copy of the tree; what the libraries below take to import is paid once.

    Args:
        copy: The tree's copy.
        seconds: How long some tests may take beside what they took when the map was made.
        took: What each test took then.
    """

    def __init__(self, copy: Copy, seconds: float, took: Mapping[str, float] | None = None) -> None:
        self.copy = copy
        self.seconds = seconds
        self.took = took or {}
        self.said = copy.root.parent / "said.txt"
        self._sound: dict[tuple[str, ...], bool] = {}

    def passes(self, tests: Sequence[str]) -> bool | None:
        """Whether tests pass; None if they took too long."""
        seconds = self.seconds + SLOWER * sum(self.took.get(name, 0.0) for name in tests)
        seconds += SERVICE_SECONDS * (list(tests) == [SERVICE])
        code = forked(lambda: self._pytest(tests), seconds, self.said)
        return None if code is None else code == 0

    def is_sound(self, tests: Sequence[str]) -> bool:
        """Whether tests pass in the tree as it is."""
        key = tuple(tests)
        if key not in self._sound:
            self._sound[key] = self.passes(tests) is True
        return self._sound[key]

    def verdict(self, one: Drawn, tests: list[str]) -> str:
        """ "noticed", "survived", "too slow" or "no test"."""
        if not tests:
            return "no test"
        for some in stages(tests):
            with self.copy.changed(one.module, one.change):
                passed = self.passes(some)
            if passed is not True:
                if not self.is_sound(some):
                    return "no sound test"
                return "too slow" if passed is None else "noticed"
        return "survived"

    def _pytest(self, tests: Sequence[str]) -> int:
        root = str(self.copy.root)
        os.chdir(root)
        os.environ |= {"PYTHONPATH": root, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        sys.path = [root, *(p for p in sys.path if p not in ("", str(ROOT)))]
        for name in [n for n in sys.modules if n.partition(".")[0] in ("tests", *PACKAGES)]:
            del sys.modules[name]
        import pytest

        marks = "ndif" if list(tests) == [SERVICE] else "not ndif and not slow"
        options = ["-x", "-q", "--rootdir", root, "-p", "no:cacheprovider", "-m", marks]
        code = int(pytest.main([*options, *tests]))
        adapters = sys.modules.get("mm_adapters")
        if adapters is not None and not str(adapters.__file__).startswith(root):
            print(f"Another tree was tested: {adapters.__file__}", flush=True)
            return 71
        return code


def preload() -> None:
    """Imports what tests import from elsewhere, nothing of ours."""
    sys.dont_write_bytecode = True
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    import beartype  # noqa: F401  Before nnsight.
    import torch

    for name in ("diffusers", "nnsight", "transformer_lens", "transformers", "matplotlib.figure",
                 "open_clip", "pyvene", "sae_lens", "scipy.stats", "sklearn.linear_model"):  # fmt: skip
        importlib.import_module(name)

    torch.set_num_threads(1)


def report(verdicts: Sequence[tuple[Drawn, str]]) -> tuple[str, bool]:
    """The rates by package, and whether they are good enough."""
    lines, counts = [], Counter[tuple[str, str]]()
    for one, verdict in verdicts:
        for group in ("/".join(one.module.split("/")[:2]), "all"):
            counts[group, verdict] += 1
    groups = sorted({group for group, _ in counts} - {"all"})
    for group in [*groups, "all"]:
        of_group = {verdict: n for (g, verdict), n in counts.items() if g == group}
        equivalent = of_group.pop("equivalent", 0)
        total, noticed = sum(of_group.values()), of_group.get("noticed", 0) + of_group.get("too slow", 0)
        rate = f"{noticed / total:6.1%}" if total else "     -"
        lines.append(f"{group:<40} {rate}  {noticed} of {total} noticed, {equivalent} equivalent")
    equivalent, n = counts["all", "equivalent"], len(verdicts)
    noticed = counts["all", "noticed"] + counts["all", "too slow"]
    good = n > equivalent and noticed / (n - equivalent) >= WANTED and equivalent <= MOST_EQUIVALENT * n
    return "\n".join(lines), good


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n", type=int, default=90)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--lines", type=Path, nargs="*", default=[], help="the maps that tests.mutation.cover has written"
    )
    parser.add_argument("--only", default="", help="modules whose path holds this")
    parser.add_argument(
        "--seconds", type=float, default=90, help="beside what tests took before; who needs more has noticed"
    )
    parser.add_argument("--ndif", action="store_true", help="a real service's code is judged by its tests")
    parser.add_argument("--list", action="store_true", help="prints the changes and makes none")
    options = parser.parse_args(argv)
    drawn = draw(options.n, options.seed, [m for m in modules() if options.only in m])
    if options.list:
        print("\n".join(map(str, drawn)))
        return 0
    lines, alike, before = Lines.read(*options.lines), equivalents(), fingerprint()
    preload()
    verdicts: list[tuple[Drawn, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        took = dict(zip(lines.tests, lines.seconds, strict=True))
        judge = Judge(Copy(Path(folder)), options.seconds, took)
        for one in drawn:
            start = time.monotonic()
            verdict = "equivalent"
            if one.key not in alike:
                by_service = options.ndif and one.module.startswith(OF_THE_SERVICE)
                tests = [*lines.of(one.module, one.change), *([SERVICE] if by_service else [])]
                verdict = judge.verdict(one, tests)
            verdicts.append((one, verdict))
            print(f"{verdict:<10} {one}  ({time.monotonic() - start:.0f} s)", flush=True)
    assert fingerprint() == before, "The tree changed during the run."
    text, good = report(verdicts)
    print(f"\n{text}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
