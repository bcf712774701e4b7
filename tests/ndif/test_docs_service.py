"""The programs of README and docs that need a service run on one, as they are pasted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from docs.extensions.blocks import Block, blocks, pages, run

ADDRESS = "http://127.0.0.1:18001"
PROGRAMS = [block for page in pages() for block in blocks(page, "python") if block.needs_service]


@pytest.mark.parametrize("block", PROGRAMS, ids=lambda block: f"{block.page.name}:{block.line}")
def test_a_program_of_the_docs_runs_on_a_service(block: Block, host: str, tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    assert ADDRESS in block.code
    run(block, names, tmp_path, replace=(ADDRESS, host))
    assert names["run"][names["site"]].equal(names["again"][names["site"]])
