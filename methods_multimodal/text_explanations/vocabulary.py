"""Texts to name things with: word lists that ship with the package, or a file of the user's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from methods_multimodal.core.record import Record
from mm_adapters import InputError
from mm_adapters.store import read_text

SHIPPED = ("general", "world")
_ANY = "any"


@dataclass(frozen=True)
class Vocabulary(Record):
    """Texts, and of each the word it is made of and the group (attribute) that the word is in."""

    texts: tuple[str, ...]
    words: tuple[str, ...]
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def of(self, groups: Iterable[str]) -> Vocabulary:
        """The texts of these groups. Raises: InputError for a group there is none of."""
        asked = set(groups)
        unknown = asked - set(self.groups)
        if unknown:
            known = ", ".join(dict.fromkeys(self.groups))
            raise InputError(
                f"No words are about {', '.join(sorted(unknown))}; there are words about {known}."
            )
        kept = [i for i, group in enumerate(self.groups) if group in asked]
        return Vocabulary(
            *(tuple(column[i] for i in kept) for column in (self.texts, self.words, self.groups))
        )


def vocabulary(source: str | Path | Sequence[str] = "general") -> Vocabulary:
    """A vocabulary: "general" (everyday words, put into templates by what they are about), "world" (what
    can be said in the zoo's world), a text file, or texts.

    A file has one text a line; a line `[colour]` says what those below it are about, and lines that
    start with # are notes.

    Raises: InputError if there is no such file, it is no text in UTF-8, or has fewer than two texts.
    """
    if isinstance(source, str | Path) and str(source) in SHIPPED:
        rows = _rows(files("methods_multimodal").joinpath(f"words/{source}.txt").read_text("utf-8"))
        if str(source) == "world":
            return _unique(rows)
        templates = attribute_templates()
        texts = tuple(templates.get(group, templates[_ANY])[0].format(word) for group, word in rows)
        return Vocabulary(texts, tuple(w for _, w in rows), tuple(g for g, _ in rows))
    if not isinstance(source, str | Path):
        return _unique([("", text) for text in source])
    path = Path(source)
    if not path.is_file():
        raise InputError(
            f"There is no vocabulary {source}: it is neither {' nor '.join(SHIPPED)}, nor a text file."
        )
    return _unique(_rows(read_text(path)))


def attribute_templates() -> dict[str, tuple[str, ...]]:
    """The shipped templates by group; those of "any" serve a group without its own."""
    templates: dict[str, list[str]] = {}
    for group, text in _rows(files("methods_multimodal").joinpath("words/templates.txt").read_text("utf-8")):
        templates.setdefault(group, []).append(text)
    return {group: tuple(texts) for group, texts in templates.items()}


def _unique(rows: Sequence[tuple[str, str]]) -> Vocabulary:
    unique = list(dict.fromkeys(rows))
    if len(unique) < 2:
        raise InputError(f"A vocabulary needs at least two texts; this one has {len(unique)}.")
    texts = tuple(text for _, text in unique)
    return Vocabulary(texts, texts, tuple(group for group, _ in unique))


def _rows(text: str) -> list[tuple[str, str]]:
    rows, group = [], ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1]
        elif line and not line.startswith("#"):
            rows.append((group, line))
    return rows
