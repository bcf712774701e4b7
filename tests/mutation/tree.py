"""A copy of the tree, in which one file at a time is another."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.mutation.changes import Change

ROOT = Path(__file__).parents[2]
PACKAGES = ("mm_adapters", "methods_multimodal", "integrations")
_LEFT_OUT = (
    ".git",
    "__pycache__",
    ".venv*",
    "build",
    "*.egg-info",
    "_build",
    "_generated",
    ".ruff_cache",
    ".ndif",
)


def modules(root: Path = ROOT) -> list[str]:
    """The modules' paths below a root, in order; an `__init__` that lists names is none."""
    found = (p for package in PACKAGES for p in sorted((root / package).rglob("*.py")))
    return [str(p.relative_to(root)) for p in found if p.name != "__init__.py"]


def fingerprint(root: Path = ROOT) -> str:
    """The same as long as no module of the tree changes."""
    digest = hashlib.sha256()
    for module in modules(root):
        digest.update(module.encode() + (root / module).read_bytes())
    return digest.hexdigest()


class Copy:
    """A copy of a tree in a folder of its own."""

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self.root = folder / "tree"
        shutil.copytree(root, self.root, ignore=shutil.ignore_patterns(*_LEFT_OUT))

    @contextmanager
    def changed(self, module: str, change: Change) -> Iterator[None]:
        """The copy with one change inside, and afterwards as it was."""
        path = self.root / module
        source = path.read_text()
        try:
            path.write_text(change.applied(source))
            yield
        finally:
            path.write_text(source)
