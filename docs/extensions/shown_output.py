"""Shows below each Python block of a page what it prints and draws; it is run when the docs are built."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from blocks import ROOT, groups, pages
from sphinx.errors import ExtensionError
from sphinx.util import logging

FOLDER = ROOT / "docs" / "_generated" / "shown"
PACKAGES = ("mm_adapters", "methods_multimodal", "integrations")
logger = logging.getLogger(__name__)


@cache
def fingerprint() -> str:
    """The sources of the packages: what was run with others is run again."""
    total = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()


def name_of(docname: str) -> str:
    return docname.replace("/", "_")


def key_of(page: Path) -> str:
    code = "\0".join(block.code for group in groups(page) for block in group)
    return hashlib.sha256(f"{fingerprint()}{code}".encode()).hexdigest()


def run_pages(app: Any) -> None:
    """Runs the blocks of every page whose blocks, or whose packages, have changed."""
    if app.config.run_code_blocks in (False, "0"):
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    stale = []
    for page in pages():
        if not page.is_relative_to(app.srcdir) or not groups(page):
            continue
        docname = page.relative_to(app.srcdir).with_suffix("").as_posix()
        key = FOLDER / f"{name_of(docname)}.key"
        if not key.exists() or key.read_text() != key_of(page):
            stale.append((page, key))
    if not stale:
        return
    logger.info("running the code blocks of %d pages", len(stale))
    command = [sys.executable, str(Path(__file__).with_name("blocks.py")), "--folder", str(FOLDER)]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "Agg",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    done = subprocess.run(
        [*command, *(str(page) for page, _ in stale)], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ExtensionError(f"A code block of the docs failed:\n{done.stderr[-4000:]}")
    for page, key in stale:
        key.write_text(key_of(page))


def add_output(app: Any, docname: str, source: list[str]) -> None:
    """Puts the printed text and the pictures below each block."""
    file, page = FOLDER / f"{name_of(docname)}.json", Path(app.srcdir) / f"{docname}.md"
    if not file.exists() or not page.exists():
        return
    shown = json.loads(file.read_text())
    run = [block for group in groups(page) for block in group]
    text, up = source[0], "../" * docname.count("/")
    # From the last to the first, so that the places of those before stay what they are.
    for block, entry in reversed(list(zip(run, shown, strict=False))):
        parts = []
        if entry["printed"].strip():
            parts.append(f"```text\n{entry['printed'].rstrip()}\n```")
        parts += [
            f"![{Path(name).stem.replace('_', ' ')}]({up}_generated/shown/{name_of(docname)}/{name})"
            for name in entry["pictures"]
        ]
        if parts:
            text = f"{text[: block.end]}\n\n" + "\n\n".join(parts) + text[block.end :]
    source[0] = text


def setup(app: Any) -> dict[str, Any]:
    # -D run_code_blocks=0 shows what the last run gave.
    app.add_config_value("run_code_blocks", True, "env", (bool, str))
    app.connect("builder-inited", run_pages)
    app.connect("source-read", add_output)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
