"""A family is a record and not code, and nothing else asks which model it has: read off the source."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAMILIES = sorted(p for p in (ROOT / "mm_adapters/families").glob("[!_]*.py"))
MODELS = {"transformers", "diffusers", "open_clip", "timm", "torchvision"}
# What turns a checkpoint's own words into a model must read them.
LOADING = {"from_transformers.py", "from_diffusers.py", "from_open_clip.py"}
SOURCES = sorted(
    p
    for folder in ("mm_adapters", "methods_multimodal", "integrations")
    for p in (ROOT / folder).rglob("*.py")
    if "zoo" not in p.parts and p.name not in LOADING
)


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", FAMILIES, ids=lambda p: p.stem)
def test_a_family_file_has_no_code_paths(path: Path) -> None:
    forbidden = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.If, ast.While, ast.Try)
    found = [type(n).__name__ for n in nodes(path) if isinstance(n, forbidden)]
    assert not found, f"{path.name} has {found}: a family is a record."
    imported = {n.module.split(".")[0] for n in nodes(path) if isinstance(n, ast.ImportFrom) and n.module}
    assert imported <= {"mm_adapters", "dataclasses", "functools"}, f"{path.name} imports {imported}"


def n_lines(path: Path) -> int:
    """A file's lines without its imports, which the formatter writes one name a line where there are many."""
    text = path.read_text()
    imports = [n for n in ast.parse(text).body if isinstance(n, ast.Import | ast.ImportFrom)]
    return len(text.splitlines()) - sum(int(n.end_lineno or 0) - n.lineno + 1 for n in imports)


def test_the_median_family_is_at_most_thirty_six_lines() -> None:
    lengths = [n_lines(p) for p in FAMILIES if p.name != "__init__.py"]
    assert statistics.median(lengths) <= 36, sorted(lengths)


# These compare with names that a record or a saved file holds.
DATA = ("stack.classes", "OWN")


def branches_on_a_model(path: Path) -> list[str]:
    """Where a file compares a model's class or name: `isinstance`, `model_type`, `__class__.__name__`."""
    found: list[str] = []
    from_models = {
        alias.asname or alias.name
        for n in nodes(path)
        if isinstance(n, ast.ImportFrom) and n.module and n.module.split(".")[0] in MODELS
        for alias in n.names
    } | MODELS
    for node in nodes(path):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
                named = {n.id for n in ast.walk(kinds) if isinstance(n, ast.Name)}
                if named & from_models:
                    found.append(f"line {node.lineno}: {ast.unparse(node)}")
            case ast.Attribute(attr="model_type" | "architectures"):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
            case ast.Compare(comparators=[other]) if (
                re.search(r"(type\(.*\)|__class__)\.__name__", ast.unparse(node))
                and ast.unparse(other) not in DATA
            ):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_asks_which_model_it_has(path: Path) -> None:
    assert not branches_on_a_model(path)


def test_the_reader_of_sources_finds_such_branches(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from transformers import CLIPModel as M\n"
        "def f(m):\n"
        "    if isinstance(m, (int, M)) or m.config.model_type == 'clip':\n"
        "        return type(m).__name__ == 'CLIPModel'\n"
    )
    assert len(branches_on_a_model(bad)) == 3
