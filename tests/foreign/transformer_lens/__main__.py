"""`python -m tests.foreign.transformer_lens`: all of TransformerLens' tests that build a model, both ways.

Prints, for each file, how many of the tests that apply pass with a tower, then what is not as listed;
returns 1 if anything is not. `--keep FOLDER` leaves the outcomes there, `--files a.py b.py` runs some.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from foreign.source import fetch_tests
from foreign.transformer_lens.compare import Comparison, compare, complaints, read_list
from foreign.transformer_lens.run import files_with_models, run


def main(argv: list[str] | None = None) -> int:
    """Runs both, prints the table, and says what is not as listed."""
    parser = argparse.ArgumentParser(prog="tests.foreign.transformer_lens", description=__doc__)
    parser.add_argument("--keep", type=Path, help="a folder for the outcomes and the logs")
    parser.add_argument("--files", nargs="+", help="some files, below tests/, in place of all")
    parser.add_argument("--tests", type=Path, help="TransformerLens' tests, if they are here already")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        tests = options.tests or fetch_tests("transformer-lens", Path(scratch) / "source")
        files = options.files or files_with_models(tests)
        theirs = run("theirs", tests, files, folder)
        reached = {
            test.partition("::")[0] for test, o in theirs.items() if o.reaches and o.outcome == "passed"
        }
        ours = run("ours", tests, sorted(f.removeprefix("tests/") for f in reached), folder)
    comparison = compare(theirs, ours, read_list("outside"))
    lines = complaints(comparison, read_list("exceptions"), whole=not options.files)
    print("\n".join(report(comparison)))
    print("\n".join(lines) or "All else is as listed.")
    return 1 if lines else 0


def report(comparison: Comparison) -> list[str]:
    """The table and its sum."""
    rows = [f"{passed:4d} of {n:4d}  {file}" for file, (passed, n) in comparison.by_file().items()]
    total = (
        f"{len(comparison.passed)} of {len(comparison.applicable)} ({comparison.share:.1%}) pass with a tower"
    )
    beyond = f"{len(comparison.outside)} more are about what a tower is not (outside.toml)"
    skips = [f"{n:4d} skipped: {why}" for why, n in comparison.skipped.most_common()]
    return [*rows, *skips, f"{total}; {beyond}."]


if __name__ == "__main__":
    sys.exit(main())
