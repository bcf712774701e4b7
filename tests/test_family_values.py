"""Each family is and computes what it did: configurations, sites, roles, and the size of every value."""

from __future__ import annotations

import json

import pytest
import tiny

from tests.family_values import SHOWN, of_family
from tests.methods.plots.shown import differences

WANTED = json.loads(SHOWN.read_text())


@pytest.mark.parametrize("name", tiny.CASES)
def test_a_family_is_what_it_was(name: str) -> None:
    assert differences(of_family(name), WANTED[name], name, rel=2e-3, abs=1e-5) == []


def test_no_family_is_left_over() -> None:
    assert WANTED.keys() == tiny.CASES.keys()
