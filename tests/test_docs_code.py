"""Every code block of README and docs runs as a reader would paste it, imports included."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from docs.extensions.blocks import Block, blocks, groups, pages, run
from mm_adapters import cli

ROOT = Path(__file__).parents[1]
KNOWN = ("python", "bash", "text", "console")
PYTHON = [group for page in pages() for group in groups(page)]
SHELL = [block for page in pages() for block in blocks(page, "bash")]


def name(block: Block | list[Block]) -> str:
    first = block[0] if isinstance(block, list) else block
    return f"{first.page.relative_to(ROOT)}:{first.line}"


@pytest.mark.parametrize("group", PYTHON, ids=name)
def test_a_program_runs_as_it_is_pasted(group: list[Block], tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    for block in group:
        run(block, names, tmp_path)


def test_a_block_that_continues_another_says_so_and_follows_it() -> None:
    for page in pages():
        python = [block for block in blocks(page, "python") if not block.needs_service]
        assert not python or not python[0].continues, page
    # Only what a reader is told needs a service is not run here; `tests/ndif/test_docs_service.py` runs it.
    assert sum(block.needs_service for page in pages() for block in blocks(page, "python")) <= 2


def without_callbacks(command: Any) -> Any:
    """The command line, parsing and checking as it does, and doing nothing."""
    for child in getattr(command, "commands", {}).values():
        without_callbacks(child)
    if not hasattr(command, "commands"):
        command.callback = lambda **options: None
    return command


def lines(block: Block) -> list[list[str]]:
    return [words for line in block.code.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("block", SHELL, ids=name)
def test_a_command_line_is_one_that_there_is(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_folder: Callable[[Path], None]
) -> None:
    if block.code.startswith("python3 -m venv"):
        # Installing is what CI does with the README's own lines: those, word for word.
        readme = (ROOT / "README.md").read_text()
        assert block.code in readme
        return
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path)
    parsed_only = block.note.startswith(("parsed only", "starts a service"))
    for words in lines(block):
        if words[0] == "mm-interp" and parsed_only:
            without_callbacks(get_command(cli.build())).main(words[1:], standalone_mode=False)
        elif words[0] == "mm-interp":
            result = CliRunner().invoke(cli.build(), words[1:])
            assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
        elif words[:2] in (["python", "-m"], [".venv-test/bin/python", "-m"]):
            assert importlib.util.find_spec(words[2]), words
        else:
            assert words[0] in (".ci/run", ".ci/oldest", "ruff", "pyright", "git"), words
            assert "/" not in words[0] or (ROOT / words[0]).exists()


@pytest.fixture
def make_folder() -> Callable[[Path], None]:
    """What the commands of the pages are given: two pictures, a folder, a configuration."""

    def make(folder: Path) -> None:
        from mm_adapters.zoo import sample_images

        first, second = list(sample_images().values())[:2]
        (folder / "FOLDER").mkdir()
        for file, picture in (("a.png", first), ("b.png", second), ("FOLDER/a.png", first)):
            (folder / file).write_bytes(picture.read_bytes())
        (folder / "sae.yaml").write_text("architecture: batchtopk\nd_sae: 64\nk: 4\n")

    return make
