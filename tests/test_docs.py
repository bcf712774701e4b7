"""What README and docs say is what there is: generated parts, pages of methods, errors, overrides, links."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from pathlib import Path

import pytest

import mm_adapters as mm
from docs.extensions.blocks import blocks, pages
from tests import write_docs
from tests.write_docs import DOCS, HOSTS, PACKAGES, PAGES, ROOT, WRITERS, front_matter, marked, method_pages

README = ROOT / "README.md"
OVERRIDES = DOCS / "developing" / "overrides.md"


@pytest.mark.parametrize("name", list(WRITERS))
def test_generated_parts_are_what_their_sources_say(name: str) -> None:
    for page in PAGES[name]:
        part = marked(name).search(page.read_text())
        assert part, page
        assert part[2].strip() == WRITERS[name](page), f"{page}: python -m tests.write_docs"


def test_every_family_that_mounts_towers_is_in_the_table() -> None:
    import mm_adapters as mm
    from mm_adapters.records import ModelRecord

    text = (DOCS / "families.md").read_text()
    assert all(record.name in text for record in mm.families.records() if isinstance(record, ModelRecord))


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) < 10_000


def test_both_commands_are_one_line_each() -> None:
    for name in ("main job", "tests"):
        block = README.read_text().split(f"<!-- command: {name} -->\n```bash\n")[1].split("```")[0]
        assert len(block.strip().splitlines()) == 1


@pytest.mark.parametrize("page", method_pages(), ids=lambda page: page.stem)
def test_a_methods_page_has_its_question_call_program_measure_and_limits(page: Path) -> None:
    said, text = front_matter(page), page.read_text()
    assert set(said) == {"question", "paper", "arxiv", "call", "room"}
    assert said["question"].endswith("?")
    assert re.fullmatch(r"(\d{4}\.\d{4,5})?", said["arxiv"])
    function = said["call"].partition("(")[0].split(".")[-1]
    room = said["room"] if said["room"].startswith("integrations") else f"methods_multimodal.{said['room']}"
    assert callable(getattr(importlib.import_module(room), function))
    assert "\n## Measured\n" in text
    assert "\n## Limits\n" in text
    shown = blocks(page, "python") or "../start/sae_lens.md" in text
    assert shown
    assert function in text.split("---\n", 2)[2]


def test_every_number_that_was_measured_names_a_command_that_there_is() -> None:
    for page in pages():
        for module in re.findall(r"`python -m (tests\.[\w.]+|mm_adapters\.[\w.]+)", page.read_text()):
            path = ROOT / Path(*module.split("."))
            assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), (page, module)
        for test in re.findall(r"`(tests/[\w/]+\.py)`", page.read_text()):
            assert (ROOT / test).exists(), (page, test)


def exceptions() -> set[str]:
    """The error classes that the packages define, whatever they derive from."""
    bases: dict[str, set[str]] = {}
    for package in ("mm_adapters", "methods_multimodal", "integrations"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    known = {n for n, e in vars(builtins).items() if isinstance(e, type) and issubclass(e, BaseException)}
    known.add("RemoteError")
    while more := {name for name, of in bases.items() if of & known} - known:
        known |= more
    return {name for name in known & bases.keys() if name.endswith("Error")}


def test_every_error_has_a_line_and_a_paragraph_and_every_paragraph_an_error() -> None:
    page = (DOCS / "errors.md").read_text()
    paragraphs = re.findall(r"^## (\w+)$", page, re.MULTILINE)
    lines = re.findall(r"^\| [^|]+ \| `(\w+)`", page, re.MULTILINE)
    assert len(set(paragraphs)) == len(paragraphs)
    assert set(paragraphs) == set(lines) == exceptions()
    assert {name for name in mm.__all__ if name.endswith("Error")} <= set(lines)


def test_what_an_error_is_also_is_as_the_page_says() -> None:
    page = (DOCS / "errors.md").read_text()
    for name, base in re.findall(r"^\| [^|]+ \| `(\w+)`[^|]*\| `(\w+)` \|$", page, re.MULTILINE):
        if hasattr(mm, name):
            assert issubclass(getattr(mm, name), getattr(builtins, base, None) or getattr(mm, base)), name


def test_links_of_the_readme_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", README.read_text()):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def sources() -> list[tuple[Path, ast.Module]]:
    files = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]
    return [(path, ast.parse(path.read_text())) for path in files]


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.Module) -> set[str]:
    """Every name that a module gives to a function, class, variable or attribute of its own."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if getattr(node.value, "id", "") in ("self", "cls") else set()
    return names


def test_every_private_name_of_a_library_that_we_touch_is_on_the_page() -> None:
    """Private names that our code imports from a host, or reads off an object and defines nowhere itself."""
    trees = sources()
    ours = set().union(*(defined(tree) for _, tree in trees))
    text = OVERRIDES.read_text()
    for path, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in HOSTS:
                touched = [alias.name for alias in node.names if private(alias.name)]
            elif isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in ours:
                touched = [node.attr]
            else:
                continue
            for name in touched:
                assert f"`{name}`" in text, f"{path}:{node.lineno}: {name} is not in {OVERRIDES.name}"


def test_each_row_of_what_we_override_names_a_test_that_there_is() -> None:
    rows = [line for line in OVERRIDES.read_text().splitlines() if line.startswith("| `")]
    rows = [line for line in rows if line not in marked("overrides").search(OVERRIDES.read_text())[2]]  # type: ignore[index]
    assert len(rows) > 20
    for row in rows:
        test = re.search(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
        assert test, row
        assert f"def {test[2]}(" in (ROOT / test[1]).read_text(), row


def test_what_is_written_is_written_once() -> None:
    assert set(WRITERS) == set(PAGES)
    assert write_docs.DOCS.is_dir()
