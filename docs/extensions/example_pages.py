"""A page for each numbered example: its question, its code as a notebook cell, and what running it shows."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from blocks import ROOT
from shown_output import fingerprint

FOLDER = ROOT / "docs" / "examples"
# Arguments of the examples that would take longest.
LIGHTER = {
    "09_train_sae": ["--images", "300", "--steps", "300"],
    "10_das": ["--epochs", "3"],
    "12_trace_words": ["--steps", "6"],
    "14_dissect": ["--images", "128"],
    "15_which_training_images": ["--images", "24"],
}
# The sources it was run with: a change of them runs it again. Progress bars are text, which is left out: as
# widgets they would ask for scripts from elsewhere.
HIDDEN = """# {}
import sys

sys.modules["ipywidgets"] = None
"""
HEADER = """---
file_format: mystnb
kernelspec:
  name: python3
language_info:
  name: python
  pygments_lexer: python
---

"""


def page(example: Path) -> str:
    """The notebook of one example, as MyST Markdown."""
    source = example.read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(source)) or ""
    question, *rest = doc.split("\n\n")
    commands = "\n\n".join(part for part in rest if "python examples/" in part)
    prose = "\n\n".join(part for part in rest if "python examples/" not in part)
    code = source.split('"""', 2)[2].split('\nif __name__ == "__main__":')[0].strip()
    out = "hooks.txt" if "hooks.txt" in source else f"{example.stem}.png"
    arguments = ", ".join(f'"{word}"' for word in [*LIGHTER.get(example.stem, []), "--out", out])
    show = f"print(main([{arguments}]).read_text())"
    if out.endswith(".png"):
        show = f"from IPython import display\n\ndisplay.Image(main([{arguments}]))"
    return (
        f"{HEADER}# {example.stem[:2]}. {question}\n\n{prose}\n\n"
        f"The whole script is `examples/{example.name}`:\n\n```bash\n{commands}\n```\n\n"
        f"```{{code-cell}} python\n:tags: [remove-cell]\n{HIDDEN.format(fingerprint())}```\n\n"
        f"```{{code-cell}} python\n{code}\n```\n\n"
        f"```{{code-cell}} python\n{show}\n```\n"
    )


def write_pages(app: Any) -> None:
    """Writes the pages that changed, and takes away those whose example is gone."""
    FOLDER.mkdir(exist_ok=True)
    examples = sorted((ROOT / "examples").glob("[0-9]*.py"))
    for old in FOLDER.glob("[0-9]*.md"):
        if old.stem not in {example.stem for example in examples}:
            old.unlink()
    for example in examples:
        file, text = FOLDER / f"{example.stem}.md", page(example)
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, Any]:
    # Before the pages are looked for: `shown_output` looks for them too.
    app.connect("builder-inited", write_pages, priority=100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
