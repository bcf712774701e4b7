"""The table of the contract, run and printed."""

from __future__ import annotations

import sys
from collections import Counter

from tests.methods.contract import check
from tests.methods.contract.families import ENGINES, family
from tests.methods.contract.kinds import families_of
from tests.methods.contract.table import METHODS, OWN_REASONS


def main() -> None:
    """Runs every case and writes a line for each method, then the reasons for refusals."""
    reasons: Counter[str] = Counter()
    ran = refused = 0
    say = sys.stdout.write
    for method in METHODS:
        families = families_of(method.kinds)
        outcomes = [(name, e, check.outcome(method.name, name, e)) for name in families for e in ENGINES]
        errors = [(name, e, one.refusal) for name, e, one in outcomes if one.refusal is not None]
        say(f"{method.name:40} {len(outcomes):5} cases {len(errors):5} refused  {', '.join(method.kinds)}\n")
        ran, refused = ran + len(outcomes), refused + len(errors)
        for name, engine, error in errors:
            own = check.own_reason(method, check.given_of(name, engine), error)
            missing = check.what_is_missing(family(name), family(name).model(engine), error)
            reasons[own.why if own else f"the record: {missing}"] += 1
    say(f"\n{len(METHODS)} methods, {ran} cases, {refused} refusals\n\n")
    for why, n in reasons.most_common():
        say(f"{n:5}  {why}\n")
    say(f"\n{len(OWN_REASONS)} reasons that are not a missing site or role\n")
