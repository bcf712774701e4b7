"""Runs files of TransformerLens' tests twice, with its objects and with ours, and compares the outcomes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]


# What builds a model that could be served, or takes one from a fixture that does.
_BUILDS = re.compile(
    r"HookedTransformer|TransformerBridge|boot_native|gpt2_(bridge|model|hooked)|hooked_processed"
)
# One architecture's adapter, one tool of the repository, machines with several devices, the hub's lists.
_LEFT_OUT = re.compile(
    r"supported_architectures|model_registry|multi_?gpu|pretrained_weight_conversions|_adapter\.py|unit/benchmarks"
    r"|test_lit\.py|hooked_encoder|^(mps|benchmarks)/|(qwen|glm|gemma|moe)\w*_bridge\.py"
)


@dataclass(frozen=True)
class Outcome:
    """What came of one test: "passed", "failed" or "skipped", and what it says if it did not pass."""

    test: str
    outcome: str
    reaches: bool
    says: str
    where: str
    seconds: float


def files_with_models(tests: Path) -> list[str]:
    """The test files, below `tests`, in which a served model can be built. Nothing else is left out."""
    names = (path.relative_to(tests).as_posix() for path in sorted(tests.rglob("test_*.py")))
    return [
        name
        for name in names
        if not _LEFT_OUT.search(name) and _BUILDS.search((tests / name).read_text(encoding="utf-8"))
    ]


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
