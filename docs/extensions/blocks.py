"""The code blocks of README and docs: found in Markdown, and run as a reader would paste them.

python docs/extensions/blocks.py --folder FOLDER docs/methods/word_maps.md ...

runs each page's Python blocks and writes what they printed, and the pictures they saved, into FOLDER. The
Sphinx build shows that below each block; `tests/test_docs_code.py` runs the same blocks as tests.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# What a reader sees as the first line of a block that needs the block above it.
CONTINUES = "# Continues the block above."
_FENCE = re.compile(
    r"^(?:<!-- (?P<note>[^\n]*?) -->\n)?(?P<indent>[ ]*)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block. `note` is the HTML comment on the line before it, "" if there is none."""

    page: Path
    line: int
    language: str
    code: str
    note: str
    start: int
    end: int

    @property
    def continues(self) -> bool:
        return self.code.startswith(CONTINUES)

    @property
    def needs_service(self) -> bool:
        """Whether it speaks to an NDIF service, so that only `tests/ndif` can run it."""
        return self.note == "needs: ndif"


def pages() -> list[Path]:
    """README, and every page of docs that is written by hand."""
    built = ("_build", "_generated", "examples")
    docs = [
        p for p in sorted((ROOT / "docs").rglob("*.md")) if p.relative_to(ROOT / "docs").parts[0] not in built
    ]
    return [ROOT / "README.md", *docs]


def blocks(page: Path, *languages: str) -> list[Block]:
    """The page's blocks in these languages, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text[: match.start("code")].count("\n") + 1,
            match["language"],
            re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE),
            match["note"] or "",
            match.start(),
            match.end(),
        )
        for match in _FENCE.finditer(text)
        if match["language"] in languages
    ]


def groups(page: Path) -> list[list[Block]]:
    """The Python blocks, each with those before it that it continues; none that needs a service."""
    runs: list[list[Block]] = []
    for block in blocks(page, "python"):
        if block.needs_service:
            continue
        if block.continues:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def run(block: Block, names: dict[str, Any], folder: Path, replace: tuple[str, str] = ("", "")) -> str:
    """Runs one block in `folder` and returns what it printed; `names` are its globals.

    The code is written to a file first: nnsight and tracebacks read it there.
    """
    code = block.code.replace(*replace) if replace[0] else block.code
    file = folder / f"{block.page.stem}_line_{block.line}.py"
    file.write_text(code, encoding="utf-8")
    names["__name__"] = "__main__"
    printed = io.StringIO()
    try:
        with working_in(folder), contextlib.redirect_stdout(printed):
            exec(compile(code, str(file), "exec"), names)
    except Exception as error:
        error.add_note(f"This is the block at {block.page}:{block.line}.")
        raise
    file.unlink()
    return printed.getvalue()


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """The current folder, for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def show(page: Path, pictures: Path) -> list[dict[str, Any]]:
    """What each Python block of a page prints and which pictures it saves, copied into `pictures`."""
    shown = []
    for group in groups(page):
        names: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as scratch:
            for block in group:
                before = set(Path(scratch).iterdir())
                printed = run(block, names, Path(scratch))
                made = sorted(p for p in Path(scratch).glob("*.png") if p not in before)
                for picture in made:
                    (pictures / picture.name).write_bytes(picture.read_bytes())
                shown.append({"printed": printed, "pictures": [p.name for p in made]})
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the pages' blocks and writes PAGE.json and pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args(argv)
    for page in options.pages:
        name = "_".join(page.resolve().relative_to(ROOT / "docs").with_suffix("").parts)
        pictures = options.folder / name
        pictures.mkdir(parents=True, exist_ok=True)
        shown = show(page.resolve(), pictures)
        (options.folder / f"{name}.json").write_text(json.dumps(shown), encoding="utf-8")


if __name__ == "__main__":
    main()
