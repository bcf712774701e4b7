"""nnsight's own tests, fetched from the package index and run with our classes in place of theirs.

`python -m tests.foreign.nnsight_runs` runs every file, with nnsight's classes and with ours, and says how
many of the tests come to a model of ours and how many of those pass. What a test says of a checkpoint's
words cannot hold for a random one: it fails with both. The checkpoints are small or random ones made here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")] if str(ROOT / "tests") not in sys.path else []

from foreign import checkpoints  # noqa: E402  (as a command, this file finds its own folder first)
from foreign.nnsight_table import EXCEPTIONS, LANGUAGE_ONLY, SKIPS  # noqa: E402
from foreign.source import fetch_tests  # noqa: E402

# Of a test that fails: a pattern of its name, one of what it says, and why.
Known = tuple[str, str, str]


@dataclass(frozen=True)
class Outcome:
    """How a test ended, what it said, and whether it came to a model of the classes that were put in."""

    name: str
    outcome: str
    says: str
    reached: bool


def run(tests: Path, names: list[str], named: dict[str, str], hub: Path, classes: str) -> dict[str, Outcome]:
    """The outcome of each test in these files, each file in a process of its own."""
    outcomes: dict[str, Outcome] = {}
    for name in names:
        written = hub / f"{classes}_{name}.jsonl"
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "FOREIGN_CHECKPOINTS": json.dumps(named),
            "FOREIGN_OUTCOMES": str(written),
            "FOREIGN_CLASSES": classes,
            "HF_HUB_CACHE": str(hub),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tests.parent)]
        command += ["-p", "foreign.plugin", "-p", "no:cacheprovider", str(tests / f"{name}.py")]
        done = subprocess.run(command, env=env, cwd=tests.parent, capture_output=True, text=True, check=False)
        assert written.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
        lines = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
        for outcome in (Outcome(*line) for line in lines):
            # What fails to be taken down after a pass has failed.
            if outcome.name not in outcomes or outcomes[outcome.name].outcome != "failed":
                outcomes[outcome.name] = outcome
    return outcomes


def check(outcomes: dict[str, Outcome], known: list[Known]) -> None:
    """Every failure is known and says what it says, none is known that passes; skips are those known."""
    failed = {name: one.says for name, one in outcomes.items() if one.outcome == "failed"}
    unexpected = {
        name: why
        for name, why in failed.items()
        if not any(re.search(test, name) and re.search(says, why) for test, says, _ in known)
    }
    assert not unexpected, json.dumps(unexpected, indent=1)
    for test, _, reason in known:
        assert any(re.search(test, name) for name in failed), (
            f"{test} passes now: no more is it that {reason}"
        )
    skipped = {name: one.says for name, one in outcomes.items() if one.outcome == "skipped"}
    unknown = {name: why for name, why in skipped.items() if not any(re.search(s, why) for s in SKIPS)}
    assert not unknown, json.dumps(unknown, indent=1)


def by_name(files: Iterable[str]) -> list[Known]:
    """The exceptions of these files."""
    here = {name: why for name, why in EXCEPTIONS.items() if name.partition(".py")[0] in files}
    return [(f"^{re.escape(name)}$", says, reason) for name, (says, reason) in here.items()]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests, hub = fetch_tests("nnsight", folder / "source"), folder / "hub"
        named = checkpoints.make(folder / "checkpoints")
        checkpoints.fill_hub(hub)
        files = sorted(path.stem for path in tests.glob("test_*.py"))
        theirs, ours = (run(tests, files, named, hub, classes) for classes in ("theirs", "ours"))
    # What fails with both says something of the checkpoint; a file without a model says nothing of ours.
    with_models = {one.name.partition("::")[0] for one in theirs.values() if one.reached}
    about_us = {
        name: one
        for name, one in ours.items()
        if name.partition("::")[0] in with_models
        and (one.outcome != "failed" or theirs.get(name, one).outcome == "passed")
    }
    reached = [one for one in about_us.values() if one.reached and one.outcome != "skipped"]
    passed = sum(one.outcome == "passed" for one in reached)
    skipped = Counter(one.outcome for one in ours.values())["skipped"]
    of_checkpoints = len(ours) - len(about_us)
    sys.stdout.write(
        f"{len(ours)} tests in {len(files)} files; {skipped} skipped; {of_checkpoints} need what a real "
        f"checkpoint says; {len(reached)} come to a model of ours, and {passed} of those pass.\n"
    )
    check(about_us, [*by_name(files), *LANGUAGE_ONLY])


if __name__ == "__main__":
    main()
