"""Runs files of TransformerLens' tests twice, with its objects and with ours, and compares the outcomes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Outcome:
    """What came of one test: "passed", "failed" or "skipped", and what it says if it did not pass."""

    test: str
    outcome: str
    reaches: bool
    says: str
    where: str
    seconds: float


def run(whose: str, tests: Path, files: list[str], folder: Path) -> dict[str, Outcome]:
    """The outcome of every test of these files, by its id."""
    from foreign.transformer_lens import served

    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        served.write_tokenizer(tokenizer, tests)
    outcomes = folder / f"{whose}.jsonl"
    outcomes.unlink(missing_ok=True)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "FOREIGN_CLASSES": whose,
        "FOREIGN_OUTCOMES": str(outcomes),
        "FOREIGN_TOKENIZER": str(tokenizer),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tests.parent)]
    command += ["-p", "foreign.transformer_lens.plugin", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--continue-on-collection-errors", *(str(tests / name) for name in files)]
    done = subprocess.run(command, env=env, cwd=tests.parent, capture_output=True, text=True, check=False)
    (folder / f"{whose}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if not outcomes.is_file():
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
    lines = [json.loads(line) for line in outcomes.read_text(encoding="utf-8").splitlines()]
    by_test: dict[str, Outcome] = {}
    for line in lines:
        made = Outcome(*line)
        # A test that passes and then fails as it is taken down has two lines.
        if made.test not in by_test or made.outcome != "passed":
            by_test[made.test] = made
    return by_test
