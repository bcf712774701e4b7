"""A short part of the fuzz of stored files: what is damaged is refused, what is whole is read."""

from __future__ import annotations

from tests.fuzz.files import holds, run


def test_damaged_files_are_refused_and_whole_ones_are_read() -> None:
    verdicts = run(80, seed=2024)
    assert holds(verdicts), [v for v in verdicts if v.outcome not in ("right", "refused", "read")]
    assert sum(v.outcome == "refused" for v in verdicts) > 40
    assert sum(v.done == "nothing" and v.outcome == "right" for v in verdicts) > 5
