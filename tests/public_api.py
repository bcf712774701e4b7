"""Every public function, class and method with its arguments: `python -m tests.public_api` writes the list.

Whoever changes a name, an argument or a default changes what others' code does, so it is changed on purpose.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = ("mm_adapters", "methods_multimodal", "integrations")
ROOT = Path(__file__).parents[1]
LISTED = Path(__file__).with_name("public_api.txt")
SET = re.compile(r"\{('[^{}:]*')\}")  # Of texts, in no order of its own.
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# What only the service's own environment can import.
IN_THE_SERVICE = {f"integrations.ndif.{name}" for name in ("actors", "fork_server", "ray_timeouts")}


def modules() -> Iterator[ModuleType]:
    """The modules whose path has no name with an underscore, and which run nothing when imported."""
    for package in PACKAGES:
        root = importlib.import_module(package)
        yield root
        for found in pkgutil.walk_packages(root.__path__, f"{package}."):
            private = any(part.startswith("_") for part in found.name.split("."))
            if not private and found.name not in IN_THE_SERVICE:
                yield importlib.import_module(found.name)


def arguments(of: Any) -> str:
    """Names, kinds and defaults; types are pyright's matter."""
    try:
        signature = inspect.signature(of)
    except (TypeError, ValueError):
        return "(?)"
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    text = ADDRESS.sub("", str(signature.replace(parameters=plain, return_annotation=signature.empty)))
    text = SET.sub(lambda found: f"{{{', '.join(sorted(found[1].split(', ')))}}}", text)
    return text.replace(f"{ROOT}/", "")  # A default inside the package lies wherever that is.


def members(of: type) -> Iterator[tuple[str, Any]]:
    """A class's own public methods."""
    for name, member in vars(of).items():
        inner = getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(inner):
            yield name, inner


def lines() -> list[str]:
    """The list, sorted."""
    out: set[str] = set()
    for module in list(modules()):  # All first: SAELens' verbs are put on models when they are imported.
        for name, of in vars(module).items():
            if name.startswith("_") or getattr(of, "__module__", None) != module.__name__:
                continue
            where = f"{module.__name__}.{name}"
            if inspect.isclass(of):
                out.add(f"{where}{arguments(of)}")
                out |= {f"{where}.{method}{arguments(inner)}" for method, inner in members(of)}
            elif inspect.isfunction(inspect.unwrap(of)) if callable(of) else False:
                out.add(f"{where}{arguments(of)}")
    return sorted(out)


if __name__ == "__main__":
    LISTED.write_text("\n".join(lines()) + "\n")
