"""nnsight's own tests of pictures, pipelines and remote jobs, passed by our classes in place of theirs.

Its source distribution is fetched from the package index, in the version that is installed; nothing of
it is kept. `python -m tests.foreign.nnsight_runs` runs all of its files.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign import checkpoints
from foreign.nnsight_runs import Outcome, by_name, check, run
from foreign.nnsight_table import EXCEPTIONS
from foreign.source import fetch_or_skip

FILES = ("test_vlm", "test_vision", "test_diffusion", "test_remote_backend", "test_ndif")


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of nnsight's tests."""
    return fetch_or_skip("nnsight", tmp_path_factory.mktemp("nnsight"))


def test_nnsights_own_tests_pass_with_our_classes(tests: Path, tmp_path: Path) -> None:
    named = checkpoints.make(tmp_path / "checkpoints")
    outcomes = run(tests, list(FILES), named, tmp_path, "ours")
    check(outcomes, by_name(FILES))
    passed = [name for name, one in outcomes.items() if one.outcome == "passed"]
    assert len(passed) >= 155  # 157 of 158 in nnsight 0.8.1; fewer were not all found.
    assert {name.partition(".py")[0] for name in passed} == set(FILES)


def test_a_failure_that_is_not_known_or_says_something_else_is_not_passed_over() -> None:
    name = next(iter(EXCEPTIONS))
    known = [(f"^{name}$", EXCEPTIONS[name][0], "")]
    fails = Outcome(name, "failed", "KeyError: 'pipeline'", True)
    check({name: fails}, known)
    with pytest.raises(AssertionError, match="something else"):
        check({name: Outcome(name, "failed", "something else", True)}, known)
    with pytest.raises(AssertionError, match="another"):
        check({name: fails, "another": Outcome("another", "failed", "", True)}, known)
    with pytest.raises(AssertionError, match="passes now"):
        check({name: Outcome(name, "passed", "", True)}, known)
    with pytest.raises(AssertionError, match="no reason"):
        check({name: fails, "left out": Outcome("left out", "skipped", "no reason", False)}, known)
