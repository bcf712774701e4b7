"""Imports go one way, from room to room; what is public; and only a family asks which model it is.

Who takes a model takes `mm.Model`, so that both engines serve every method. This is read off the source:
a public function or method (no name on the way to it begins with "_") whose parameter is called `model`
must say its type, and that is not `Any`; if it is `Model`, it comes first. No parameter is a `Lens` or of an
engine's class, and none is called `lens`.
A name (`str`), a module (`nn.Module`: what can be attributed to need not be a model of ours) and a host
library's own class are types too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from import_graph import circles, graph_of, imported, modules_of, page_imports

ROOT = Path(__file__).parents[1]
PACKAGES = ("mm_adapters", "methods_multimodal", "integrations")
MAY_IMPORT = {"mm_adapters": set(), "methods_multimodal": {"mm_adapters"}, "integrations": {"mm_adapters"}}
SOURCES = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]

# What may be imported from outside mm_adapters; of the zoo also what lies below it. At most eight.
PUBLIC = (
    "mm_adapters",
    "mm_adapters.inputs.images",
    "mm_adapters.records",
    "mm_adapters.remote",
    "mm_adapters.store",
    "mm_adapters.traced",
    "mm_adapters.zoo",
)
# Rooms from the lowest layer up: a room imports from lower layers, and nothing of its own layer but itself.
LAYERS = {
    "mm_adapters": (
        ("_errors",),
        ("records",),
        ("families", "tokens"),
        ("sites",),
        ("hooks", "inputs", "layouts"),
        ("runs",),
        ("checkpoints",),
        ("storage",),
        ("store", "tl_engine", "nnsight_engine", "zoo"),
        ("ndif_client", "hooked"),
        ("traced",),
        ("loading",),
        ("__init__",),
        ("cli", "remote"),
    ),
    "methods_multimodal": (
        ("core",),
        ("diffusion",),
        ("text_explanations", "lenses", "probing"),
        ("patching", "attribution"),
        ("cross_attention", "circuits", "relevance", "neurons", "data_attribution", "dissection", "steering",
         "editing"),
        ("composition", "decoding", "detection", "evaluation"),
        ("plots",),
        ("report", "viewer"),
        ("commands",),
        ("__init__",),
    ),
    "integrations": (("ndif", "pyvene", "sae_lens", "transformer_lens"), ("commands",), ("__init__",)),
}  # fmt: skip


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(module: str) -> str:
    """The room of a module: its package's part, or the module itself if it is in none."""
    return module.split(".")[1] if "." in module else "__init__"


def is_public(module: str) -> bool:
    return module in PUBLIC or module.startswith("mm_adapters.zoo.")


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_from_methods_and_integrations_to_adapters(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    roots = {module.partition(".")[0] for module, _ in imported(ast.parse(path.read_text()), {})}
    assert (roots & set(PACKAGES)) - {own} <= MAY_IMPORT[own]
    assert not roots & {"tests", "examples"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other(package: str) -> None:
    """Not even where they are used, or for types."""
    assert circles(graph_of(package)) == []


def test_circles_are_found_through_others_and_in_functions(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for module, text in {
        "__init__": "",
        "a": "from p import b\n",
        "b": "def f():\n    from p.c import x\n",
        "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.a\nx = 1\n",
        "d": "from p.a import b\n",
    }.items():
        (tmp_path / "p" / f"{module}.py").write_text(text)
    assert circles(graph_of("p", tmp_path)) == [["p.a", "p.b", "p.c"]]


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_from_lower_layers_only(package: str) -> None:
    layer = {name: number for number, names in enumerate(LAYERS[package]) for name in names}
    graph = graph_of(package)
    unknown = sorted({room(module) for module in graph} - layer.keys())
    assert not unknown, f"{unknown} stand in no layer of {package}: write them into LAYERS."
    up = [
        f"{module} -> {other}"
        for module in sorted(graph)
        for other in sorted(graph[module])
        if room(module) != room(other) and layer[room(module)] <= layer[room(other)]
    ]
    assert not up


def test_there_are_few_public_modules() -> None:
    assert len(PUBLIC) <= 8
    assert set(PUBLIC) <= modules_of("mm_adapters").keys()


OUTSIDE = [
    *(
        p
        for folder in ("methods_multimodal", "integrations", "examples")
        for p in sorted((ROOT / folder).rglob("*.py"))
    ),
]
PAGES = [
    p
    for folder in (".", "docs", "mm_adapters/families")
    for pattern in ("*.md", "*.rst", "*.ipynb")
    for p in sorted((ROOT / folder).glob(pattern) if folder == "." else (ROOT / folder).rglob(pattern))
    if "_build" not in p.parts
]


@pytest.mark.parametrize("path", OUTSIDE, ids=name)
def test_only_public_modules_are_imported_from_outside(path: Path) -> None:
    known = modules_of("mm_adapters")
    tree = ast.parse(path.read_text())
    private = [
        f"line {line}: {module}"
        for module, line in imported(tree, known)
        if module.partition(".")[0] == "mm_adapters" and not is_public(module)
    ]
    private += [
        f"line {node.lineno}: {alias.name} of {node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mm_adapters")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not private


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_only_public_modules_are_imported_in_pages(path: Path) -> None:
    modules = page_imports(path.read_text(encoding="utf-8"), modules_of("mm_adapters"))
    assert [m for m in modules if m.partition(".")[0] == "mm_adapters" and not is_public(m)] == []


def test_the_imports_of_pages_are_read_from_their_code_blocks() -> None:
    known = modules_of("mm_adapters")
    text = (
        "from mm_adapters.hooks import x\n"
        "```python\nfrom mm_adapters import load, loading\n    import a.b\n```\n"
    )
    assert page_imports(text, known) == {"mm_adapters", "mm_adapters.loading", "a.b"}


def functions(tree: ast.AST, at: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """The functions and methods of a source, with the names on the way to them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{at}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{at}{node.name}.")
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from functions(node, at)


# A command's model is a name.
METHODS = [p for p in SOURCES if p.relative_to(ROOT).parts[0] != "mm_adapters" and "commands" not in name(p)]


def models_badly_typed(source: str, where: str = "") -> list[str]:
    """Public functions whose `model` has no type, any or is not first; and what else is of one engine."""
    bad = []
    for called, node in functions(ast.parse(source)):
        way = (*Path(where).with_suffix("").parts, *called.split("."))
        if any(part.startswith("_") and part != "__init__" for part in way) or called.endswith("__init__"):
            continue
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [p.arg for p in parameters if p.arg not in ("self", "cls")]
        for p in parameters:
            kind = "" if p.annotation is None else ast.unparse(p.annotation).strip("'\"")
            parts = {part.strip().rpartition(".")[2] for part in kind.split("|")}
            untyped = p.arg == "model" and (not kind or "Any" in parts)
            if untyped or parts & {"Lens", "HookedModel", "TracedModel"}:
                bad.append(f"{where}:{called}, line {node.lineno}: {p.arg}: {kind or 'nothing'}")
            elif p.arg == "model" and parts == {"Model"} and names[0] != "model":
                bad.append(f"{where}:{called}, line {node.lineno}: model is not the first parameter")
    return bad


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_public_functions_take_a_model_of_either_engine_first(path: Path) -> None:
    assert models_badly_typed(path.read_text(), name(path)) == []


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_no_parameter_is_called_lens(path: Path) -> None:
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.arg) and n.arg == "lens"]
    assert not [f"line {n.lineno}" for n in nodes]


def test_badly_typed_models_are_found() -> None:
    source = """
def a(model): ...
def b(model: Any): ...
def c(x, model: Model): ...
def d(model: mm.HookedModel): ...
def e(model: Model | None = None): ...
def _f(model): ...
class G:
    def __init__(self, model): ...
    def h(self, model: Model): ...
    def i(self, *, model: Lens | None): ...
def j(model: nn.Module, x): ...
def k(model: str): ...
"""
    assert [line.partition(",")[0] for line in models_badly_typed(source, "m.py")] == [
        "m.py:a",
        "m.py:b",
        "m.py:c",
        "m.py:d",
        "m.py:G.i",
    ]
    assert models_badly_typed(source, "_m.py") == []


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
