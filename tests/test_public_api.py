"""What is public is what it was: names, arguments and defaults."""

from __future__ import annotations

from tests.public_api import LISTED, lines


def test_public_names_arguments_and_defaults_are_those_listed() -> None:
    found, listed = set(lines()), set(LISTED.read_text().splitlines())
    advice = "If this is meant: python -m tests.public_api, and say it in the CHANGELOG."
    assert sorted(found ^ listed) == [], advice
