"""Imports go one way, and nobody but a family asks which model it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mm_adapters", "methods_multimodal", "integrations")
MAY_IMPORT = {"mm_adapters": set(), "methods_multimodal": {"mm_adapters"}, "integrations": {"mm_adapters"}}
SOURCES = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_from_methods_and_integrations_to_adapters(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    roots = {module.partition(".")[0] for module in imported(ast.parse(path.read_text()))}
    assert (roots & set(PACKAGES)) - {own} <= MAY_IMPORT[own]
    assert not roots & {"tests", "examples"}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_families_know_model_classes(path: Path) -> None:
    """No branch on which model it is: no `model_type`, no isinstance against a library's model class."""
    if "zoo" in path.parts:  # It builds its own models.
        return
    tree = ast.parse(path.read_text())
    models = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").partition(".")[0] in ("transformers", "diffusers", "open_clip", "timm")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr != "model_type", f"line {node.lineno}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            against = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            assert not against & models, f"line {node.lineno}"


def test_family_files_are_records_and_small() -> None:
    files = [p for p in (ROOT / "mm_adapters/families").glob("*.py") if not p.name.startswith("_")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If | ast.While | ast.Try), path


def test_no_module_prints_or_clears_what_others_own() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") not in ("print", "breakpoint", "exit"), path
            if isinstance(node, ast.Attribute) and node.attr == "clear" and "_hooks" in ast.dump(node.value):
                raise AssertionError(f"{path}:{node.lineno} clears hooks that may be another's.")
