"""`python -m tests.quality`: what it writes is what the pages show, and each page's table is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.quality.__main__ import TABLES, as_page, run

DOCS = Path(__file__).parents[2] / "docs"


def test_a_table_is_printed_and_kept_for_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLES, "that", (("this",), ("--small",)))
    run("that", tmp_path, quick=True)
    text = (tmp_path / "that.md").read_text("utf-8")
    assert text.startswith("```text\nThe Zen of Python")
    assert as_page("\n| a |\n|---|\n| 1 |\n\n") == "| a |\n|---|\n| 1 |\n"


def test_every_table_of_a_page_is_one_that_the_command_makes() -> None:
    shown = [
        name
        for page in (DOCS / "methods").glob("*.md")
        for name in re.findall(r"\{include\} \.\./tables/(.+)\.md", page.read_text("utf-8"))
    ]
    assert shown
    assert set(shown) <= set(TABLES)
    assert {p.stem for p in (DOCS / "tables").glob("*.md")} == set(shown)
