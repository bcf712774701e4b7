"""Which module imports which: read off the source, lazy imports and those for type checkers too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
Graph = Mapping[str, set[str]]
# A line of a code block in a page.
_LINE = re.compile(
    r"^\s*(?:>>> )?((?:from\s+[\w.]+\s+import\s+\(?[\w.,* ]+|import\s+[\w., ]+))", re.MULTILINE
)


@cache
def modules_of(package: str, root: Path = ROOT) -> dict[str, Path]:
    """The modules of a package by their dotted names."""
    names = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported(tree: ast.AST, known: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    """What a source imports, with the line: the module, if it is a known one, else the name after it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module, node.lineno


@cache
def graph_of(package: str, root: Path = ROOT) -> Graph:
    """For each module of a package the others of it that it imports."""
    known = modules_of(package, root)
    return {
        name: {module for module, _ in imported(ast.parse(path.read_text()), known) if module in known}
        - {name}
        for name, path in known.items()
    }


def circles(graph: Graph) -> list[list[str]]:
    """The groups of modules that import each other, directly or through others."""
    reach = {name: _reached(graph, name) for name in graph}
    groups = {
        tuple(sorted({name} | {other for other in reach[name] if name in reach[other]}))
        for name in graph
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def page_imports(text: str, known: Mapping[str, Path]) -> set[str]:
    """What the code blocks of a page import."""
    names: set[str] = set()
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in _LINE.findall(block):
            source = line.replace("(", "").rstrip(", ")
            names |= {name for name, _ in imported(ast.parse(source), known)}
    return names


def _reached(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    left = list(graph[start])
    while left:
        if (name := left.pop()) not in seen:
            seen.add(name)
            left += graph.get(name, ())
    return seen
