"""The generated parts of README and docs.

python -m tests.write_docs

writes what stands between `<!-- generated: NAME -->` and `<!-- /generated -->`. `tests/test_docs.py`
compares.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    "commands": (ROOT / "README.md", DOCS / "commands.md"),
    "methods": (ROOT / "README.md", DOCS / "methods" / "index.md"),
    "families": (DOCS / "families.md",),
    "states": (DOCS / "states.md",),
    "host members": (DOCS / "hosts.md",),
    "overrides": (DOCS / "developing" / "overrides.md",),
}
# The libraries whose classes this project's classes extend.
HOSTS = ("nnsight", "transformer_lens", "cloudpickle", "sae_lens", "pyvene")
PACKAGES = ("mm_adapters", "methods_multimodal", "integrations")
# In the order of the tables; a method's page names its room.
ROOMS = (
    "text_explanations", "lenses", "patching", "circuits", "relevance", "cross_attention", "diffusion",
    "dissection", "data_attribution", "integrations.sae_lens", "integrations.pyvene",
)  # fmt: skip


def marked(name: str) -> re.Pattern[str]:
    """The part of a page of this name, its marks in groups 1 and 3."""
    return re.compile(rf"(<!-- generated: {name} -->\n)(.*?)(<!-- /generated -->)", re.DOTALL)


def commands(page: Path) -> str:
    """Every command with the first sentence of its help."""
    from typer.main import get_command

    from mm_adapters import cli

    rows: list[str] = []

    def add(command: Any, name: str) -> None:
        for child_name, child in getattr(command, "commands", {}).items():
            add(child, f"{name} {child_name}")
        if not getattr(command, "commands", None):
            said = " ".join((command.help or "").split("\n\n")[0].split())
            rows.append(f"| `{name}` | {said} |")

    add(get_command(cli.build()), "mm-interp")
    return "\n".join(["| command | what it does |", "|---|---|", *sorted(rows)])


def method_pages() -> list[Path]:
    return [path for path in sorted((DOCS / "methods").glob("*.md")) if path.stem != "index"]


def front_matter(page: Path) -> dict[str, str]:
    """The `name: value` lines at the top of a page."""
    lines = page.read_text(encoding="utf-8").split("---\n")[1].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name: value.strip().strip('"') for name, _, value in pairs}


def methods(page: Path) -> str:
    """The methods by room: in README with the paper's number, in docs with its names and a link."""
    about = [(front_matter(path), path) for path in method_pages()]
    about.sort(key=lambda pair: ROOMS.index(pair[0]["room"]))
    short = page.name == "README.md"
    rows = ["| question | arXiv | call |" if short else "| question | paper | call |", "|---|---|---|"]
    for said, path in about:
        link, number = path.relative_to(page.parent).as_posix(), said["arxiv"]
        if short:
            name = said["call"].partition("(")[0]
            rows.append(f"| {said['question']} | {number or said['paper'] or '–'} | [`{name}`]({link}) |")
        else:
            paper = said["paper"] or "–"
            paper = f"[{paper}](https://arxiv.org/abs/{number})" if number else paper
            rows.append(f"| [{said['question']}]({link}) | {paper} | `{said['room']}`: `{said['call']}` |")
    return "\n".join(rows)


def families(page: Path) -> str:
    """The families, from the records and a tiny model of each."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    import mm_adapters as mm

    rows = ["| family | kind | towers | sites of a tiny one | classes |", "|---|---|---|---|---|"]
    for name, make in tiny.CASES.items():
        model = mm.HookedModel(make().model)
        towers = ", ".join(f"{t} ({m.record.name})" for t, m in model.towers.items())
        classes = ", ".join(f"`{c}`" for c in model.record.classes)
        rows.append(f"| {name} | {model.kind} | {towers} | {len(model.sitemap)} | {classes} |")
    return "\n".join(rows)


def states(page: Path) -> str:
    """What is right in each state of a model, by kind; `tests/states` runs each cell with both engines."""
    from tests.states.kinds import KINDS
    from tests.states.table import STATES

    rows = ["| state | brought about by | " + " | ".join(KINDS) + " |", "|---" * (2 + len(KINDS)) + "|"]
    for state in STATES:
        answer, refusal = "right", state.refusal
        if refusal is not None:
            parts = " and ".join(f"`{part}`" for part in refusal.parts)
            where = f" of the {refusal.tower}" if refusal.tower else ""
            answer = f"right, but {parts}{where}: `{refusal.error.__name__}` (`{refusal.says}`)"
        cells = [answer if kind in state.kinds else f"– ({state.why_not})" for kind in KINDS]
        rows.append(f"| {state.name} | {state.how or '–'} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def host_members(page: Path) -> str:
    """Each public member of the hosts' classes: that it works, or why it is refused."""
    from integrations.pyvene._members import MEMBERS as OF_PYVENE
    from integrations.sae_lens._members import MEMBERS as OF_SAE_LENS
    from mm_adapters.tl_engine.host_members import REFUSED
    from tests.hosts import transformer_lens_members

    hosts = {
        f"TransformerLens' {host}": {name: REFUSED.get(name, "") for name in members}
        for host, members in sorted(transformer_lens_members().items())
    }
    hosts |= {
        "SAELens' HookedSAETransformer and SAETransformerBridge": OF_SAE_LENS,
        "pyvene's IntervenableModel": OF_PYVENE,
    }
    lines: list[str] = []
    for host, members in hosts.items():
        works = [f"`{name}`" for name, why in sorted(members.items()) if not why]
        refused = {name: why for name, why in sorted(members.items()) if why}
        lines += [f"## {host}", "", f"Works ({len(works)}): {', '.join(works)}.", ""]
        if refused:
            lines += ["| refused | because |", "|---|---|"]
            lines += [f"| `{name}` | {why} |" for name, why in refused.items()] + [""]
    return "\n".join(lines).strip()


def our_classes() -> list[type]:
    """Every class of this project that can be imported here (a service's own needs Ray)."""
    found: dict[type, None] = {}
    for package in map(importlib.import_module, PACKAGES):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if ".zoo." in info.name or info.name == "integrations.ndif.actors":
                continue
            module = importlib.import_module(info.name)
            for value in vars(module).values():
                if inspect.isclass(value) and value.__module__ == module.__name__:
                    found[value] = None
    return list(found)


def overrides(page: Path) -> str:
    """Each private member of a host's class that a class of ours overrides, with the host's signature."""
    rows = set()
    for cls in our_classes():
        for base in cls.__mro__[1:]:
            if base.__module__.partition(".")[0] not in HOSTS:
                continue
            for name in set(vars(cls)) & set(vars(base)):
                if name.startswith("_") and not name.startswith("__") and name != "_abc_impl":
                    theirs = f"{base.__module__}.{base.__qualname__}.{name}"
                    ours = f"{cls.__module__}.{cls.__qualname__}"
                    rows.add(f"| `{theirs}` | `{shape(base, name)}` | `{ours}` |")
    return "\n".join(["| theirs | its signature | ours |", "|---|---|---|", *sorted(rows)])


def shape(base: type, name: str) -> str:
    """A host's member as it is called, without types."""
    value = inspect.getattr_static(base, name)
    function = getattr(value, "__func__", getattr(value, "fget", value))
    if not callable(function) or inspect.isclass(function):
        return type(value).__name__
    return "(" + ", ".join(
        {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(p.kind.name, "") + p.name
        for p in inspect.signature(function).parameters.values()
    ) + ")"  # fmt: skip


WRITERS: dict[str, Callable[[Path], str]] = {
    "commands": commands, "methods": methods, "families": families, "states": states, "overrides": overrides,
    "host members": host_members,
}  # fmt: skip


def main() -> None:
    """Writes every part into its pages."""
    import beartype  # noqa: F401  Before nnsight, whose `.save` on every object it cannot be imported after.

    for name, pages in PAGES.items():
        for page in pages:
            text = page.read_text(encoding="utf-8")
            made = WRITERS[name](page)
            page.write_text(
                marked(name).sub(lambda m, made=made: f"{m[1]}{made}\n{m[3]}", text), encoding="utf-8"
            )


if __name__ == "__main__":
    main()
