"""The README's program runs, its commands are the ones CI uses, its table is what is registered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny

import mm_adapters as mm
from mm_adapters.records.spec import ModelRecord

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- families: written by tests/test_readme.py -->", "<!-- /families -->"


def table() -> str:
    """The families, from the records and a tiny model of each."""
    rows = ["| family | kind | towers | sites of a tiny one | classes |", "|---|---|---|---|---|"]
    for name, make in tiny.CASES.items():
        model = mm.HookedModel(make().model)
        towers = ", ".join(f"{t} ({m.record.name})" for t, m in model.sitemap.towers.items())
        classes = ", ".join(f"`{c}`" for c in model.sitemap.model_record.classes)
        rows.append(f"| {name} | {model.kind} | {towers} | {len(model.sitemap)} | {classes} |")
    return "\n".join(rows)


def test_the_family_table_is_what_is_registered(request: pytest.FixtureRequest) -> None:
    text = README.read_text()
    head, rest = text.split(BEGIN)
    old, tail = rest.split(END)
    if old.strip() != table():
        README.write_text(f"{head}{BEGIN}\n{table()}\n{END}{tail}")
        pytest.fail("The README's table was out of date; it has been written again. Commit it.")
    assert all(r.name in text or not isinstance(r, ModelRecord) for r in mm.families.records())


def test_the_first_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)[0]
    exec(compile(program, "README.md", "exec"), {})


def test_both_commands_are_one_line_each() -> None:
    for name in ("main job", "tests"):
        block = README.read_text().split(f"<!-- command: {name} -->\n```bash\n")[1].split("```")[0]
        assert len(block.strip().splitlines()) == 1
