"""Fuzzes both engines: `python tests/fuzz/inputs.py --n 2000 --seed 1`.

Generates calls, valid and bad, on the shipped and on tiny random models, does each, and judges it by what the
library's own model gives. `--only INDEX` does one of them alone. Ends with 1 if a call was silently wrong,
stood still or left the model changed, or if more than 2 % of the bad ones were answered by another
library's error or more than 2 % of the valid ones were refused.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]
# As a program its own folder is first on the path, where `generate` and `call` are top-level names.
sys.path[:] = [str(ROOT), str(ROOT / "tests"), *(p for p in sys.path if Path(p) != Path(__file__).parent)]

from tests.fuzz.call import Expect  # noqa: E402
from tests.fuzz.generate import generate  # noqa: E402
from tests.fuzz.models import forget  # noqa: E402
from tests.fuzz.outcome import BROKEN, Outcome, Verdict, judge  # noqa: E402
from tests.fuzz.state import State  # noqa: E402

MOST_FOREIGN = MOST_REFUSED = 0.02
LEAST_VALID = 0.4


class Judge:
    """Judges calls, one after the other; what is left changed is built anew."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.states: dict[tuple[str, str], State] = {}

    def __call__(self, index: int) -> Verdict:
        call = generate(self.seed, index)
        key = call.subject.name, call.subject.engine
        if key not in self.states or self.states[key].subject is not call.subject:
            self.states[key] = State(call.subject)
        verdict = judge(call, self.states[key])
        if verdict.outcome in (Outcome.STATE, Outcome.HANG):
            forget(call.subject)
        return verdict


def is_valid(verdict: Verdict) -> bool:
    return verdict.call.expect is Expect.VALUE


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The shares that decide: of valid calls, of foreign answers to bad ones, of valid ones refused."""
    valid = [v for v in verdicts if is_valid(v)]
    bad = [v for v in verdicts if not is_valid(v)]
    return {
        "valid": len(valid) / max(1, len(verdicts)),
        "foreign of the bad": sum(v.outcome is Outcome.FOREIGN for v in bad) / max(1, len(bad)),
        "refused of the valid": sum(v.outcome in (Outcome.REFUSED, Outcome.FOREIGN) for v in valid)
        / max(1, len(valid)),
    }


def holds(verdicts: Sequence[Verdict]) -> bool:
    share = shares(verdicts)
    return (
        not any(v.outcome in BROKEN for v in verdicts)
        and share["foreign of the bad"] <= MOST_FOREIGN
        and share["refused of the valid"] <= MOST_REFUSED
    )


def table(verdicts: Sequence[Verdict]) -> str:
    """The outcomes by kind of call, and the shares."""
    counts: dict[str, collections.Counter[Outcome]] = collections.defaultdict(collections.Counter)
    for v in verdicts:
        counts[v.call.kind][v.outcome] += 1
        counts["all"][v.outcome] += 1
    heads = ["kind of call", "calls", *(o.value for o in Outcome)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for kind in sorted(counts, key=lambda k: (k == "all", k)):
        row = [kind, sum(counts[kind].values()), *(counts[kind][o] or "" for o in Outcome)]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += [f"{name}: {share:.1%}" for name, share in shares(verdicts).items()]
    return "\n".join(lines)


def failures(verdicts: Iterable[Verdict], seed: int) -> list[str]:
    """What is not as it should be, each with the command that does it again."""
    fine = (Outcome.RIGHT, Outcome.CLEAR, Outcome.SHOWN)
    return [
        f"{v.outcome.value}: {v.call.line()}\n    -> {v.seen}\n"
        f"    python tests/fuzz/inputs.py --seed {seed} --only {v.call.index}"
        for v in sorted(verdicts, key=lambda v: (v.outcome.value, v.call.kind))
        if v.outcome not in fine
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=200, help="how many calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None, help="the number of one call, done alone")
    parser.add_argument("--kind", default="", help="only calls whose kind has this in its name")
    options = parser.parse_args(argv)
    judged = Judge(options.seed)
    numbers = range(options.n) if options.only is None else [options.only]
    if options.kind:
        numbers = [i for i in numbers if options.kind in generate(options.seed, i).kind]
    verdicts = [judged(i) for i in numbers]
    for line in failures(verdicts, options.seed):
        print(line)
    if options.only is not None:
        print(verdicts[0].call.line(), "->", verdicts[0].outcome.value, verdicts[0].seen)
    else:
        print(table(verdicts))
    return 0 if holds(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
