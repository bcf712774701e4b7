"""TransformerLens' own tests of hooks, caches, padding, tokens and part runs, passed by a tower.

A few quick files; `python -m tests.foreign.transformer_lens` runs all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign.source import fetch_or_skip
from foreign.transformer_lens.compare import Comparison, Listed, compare, complaints, read_list
from foreign.transformer_lens.run import Outcome, run

QUICK = [
    "acceptance/test_activation_cache.py",
    "integration/test_cache_pos_slice.py",
    "integration/test_cross_entropy_loss.py",
    "integration/test_hooks.py",
    "integration/test_kv_cache.py",
    "integration/test_left_padding.py",
    "integration/test_prepend_bos.py",
    "integration/test_start_at_layer.py",
    "integration/test_stop_at_layer.py",
]


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of TransformerLens' tests."""
    return fetch_or_skip("transformer-lens", tmp_path_factory.mktemp("transformer_lens"))


def test_transformer_lens_own_tests_pass_with_a_tower(tests: Path, tmp_path: Path) -> None:
    theirs, ours = (run(whose, tests, QUICK, tmp_path) for whose in ("theirs", "ours"))
    found = compare(theirs, ours, read_list("outside"))
    assert not complaints(found, read_list("exceptions"), whole=False)
    assert len(found.applicable) >= 120  # Of TransformerLens 3.9.0; fewer were not all found.
    assert found.share >= 0.95
    passed, of = found.by_file()["tests/acceptance/test_activation_cache.py"]
    assert passed == of >= 41


def outcome(test: str, came: str = "passed", reaches: bool = True, says: str = "") -> Outcome:
    return Outcome(test, came, reaches, says, "", 0.0)


def judged(ours: Outcome, *exceptions: Listed) -> tuple[Comparison, list[str]]:
    """What is said of one test that passes with TransformerLens' own object."""
    found = compare({"tests/a.py::test": outcome("tests/a.py::test")}, {ours.test: ours})
    return found, complaints(found, exceptions, whole=True)


def test_a_failure_that_is_not_listed_is_a_complaint() -> None:
    failed = outcome("tests/a.py::test", "failed", says="no such option")
    assert judged(failed)[1] == ["tests/a.py::test fails: failed: no such option ()"]
    assert judged(failed, Listed("a.py::test", "why", "no such"))[1] == []
    assert "another way" in judged(failed, Listed("a.py::test", "why", "what else"))[1][0]


def test_a_pass_that_does_not_reach_a_tower_and_a_skip_are_failures() -> None:
    assert "without reaching" in judged(outcome("tests/a.py::test", reaches=False))[1][0]
    assert "skipped" in judged(outcome("tests/a.py::test", "skipped", says="Skipped: no device"))[1][0]
    assert "not run" in judged(outcome("tests/b.py::test"))[1][0]


def test_what_is_listed_and_passes_or_is_gone_is_a_complaint() -> None:
    passed = outcome("tests/a.py::test")
    assert "passes now" in judged(passed, Listed("a.py::test", "why"))[1][0]
    assert "no test that applies" in judged(passed, Listed("gone.py::test", "why"))[1][0]


def test_what_fails_or_does_not_reach_with_theirs_does_not_apply() -> None:
    theirs = {
        "tests/a.py::1": outcome("tests/a.py::1", reaches=False),
        "tests/a.py::2": outcome("x", "failed"),
    }
    assert compare(theirs, {}).applicable == []
    reached = {"tests/a.py::1[p-0]": outcome("tests/a.py::1[p-0]")}
    assert compare(reached, {}, [Listed("a.py::1[[]*", "why")]).applicable == ["tests/a.py::1[p-0]"]
    assert compare(reached, {}, [Listed("a.py::1[p-*", "why")]).outside == ["tests/a.py::1[p-0]"]


@pytest.mark.parametrize("name", ["exceptions", "outside"])
def test_each_row_has_a_reason(name: str) -> None:
    rows = read_list(name)
    assert all(row.why.endswith(".") for row in rows)
    assert len({row.tests for row in rows}) == len(rows)
    assert name == "outside" or all(row.says for row in rows)
