"""Each report says and shows what it did when its page was last looked at.

After a change that is meant, or other weights, draw them again
(`python -m tests.methods.reports.pages FOLDER`) and look.
"""

from __future__ import annotations

import json

import pytest

from tests.methods.plots.shown import differences
from tests.methods.reports.pages import PAGES, SHOWN, shown

WANTED = json.loads(SHOWN.read_text())


@pytest.mark.parametrize("name", PAGES)
def test_a_report_says_what_it_did(name: str) -> None:
    assert differences(shown(PAGES[name]()), WANTED[name], name, rel=0.02, abs=2e-3) == []


def test_no_page_is_left_over() -> None:
    assert WANTED.keys() == PAGES.keys()
