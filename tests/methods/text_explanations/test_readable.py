"""A vocabulary that the model cannot read is noticed, and said."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import mm_adapters as mm
from methods_multimodal.text_explanations.readable import own_words, readability
from methods_multimodal.text_explanations.vocabulary import Vocabulary, vocabulary
from mm_adapters import cli
from mm_adapters.zoo import world
from mm_adapters.zoo.measures import images_of

EVERYDAY = ("elephant", "violin", "house", "river", "guitar", "mountain", "pencil", "bridge")


def test_words_of_the_world_are_read_and_everyday_words_fall_into_letters() -> None:
    model = mm.load("tiny-clip")
    known = readability(model, vocabulary([f"a photo of a {shape}" for shape in world.SHAPES]))
    unknown = readability(model, vocabulary([f"a photo of a {word}" for word in EVERYDAY]))
    assert len(known.unread()) <= 1
    assert len(unknown.unread()) >= 6
    # Known words lie further apart than letters do, unknown ones do not.
    assert known.spread > 1.5 * known.spread_of_letters
    assert unknown.spread < 1.2 * unknown.spread_of_letters


def test_a_text_s_own_words_are_those_its_group_does_not_share() -> None:
    texts = ("a photo of a red ring", "a photo of a blue ring", "a star", "the dog Dog")
    words = Vocabulary(texts, (*texts[:3], "Dog"), ("x", "x", "y", "z"))
    own = [[text[a:b] for a, b in at] for text, at in zip(texts, own_words(words), strict=True)]
    # A group of one text shares nothing with others; a word that is said is taken where it comes last.
    assert own == [["red"], ["blue"], ["a", "star"], ["Dog"]]


@pytest.mark.parametrize(("words", "is_noted"), [(EVERYDAY, True), (world.SHAPES, False)])
def test_the_command_says_that_words_are_not_read(
    words: tuple[str, ...], is_noted: bool, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images_of([world.scene(i, "validation", kind="one") for i in range(12)])):
        image.save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "words.txt").write_text("".join(f"a photo of a {word}\n" for word in words))
    options = [
        "--images",
        tmp_path / "images",
        "--vocabulary",
        tmp_path / "words.txt",
        "--out",
        tmp_path / "out",
    ]
    options += ["--texts", 2, "--effects", 4]
    result = CliRunner().invoke(cli.build(), ["heads", *map(str, options)])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    page = (tmp_path / "out" / "heads.html").read_text("utf-8")
    assert ("Names from this vocabulary say little" in result.output) is is_noted
    assert ("Names from this vocabulary say little" in page) is is_noted
    assert "Names describe the direct path only" in page
    assert page.count("held at its mean: direct") == 16
