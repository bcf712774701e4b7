"""No plot, page or command prints a zero with a minus sign."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from methods_multimodal.cross_attention import Effects
from methods_multimodal.plots import effect_grid, heatmap
from methods_multimodal.report._page import rounded

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("methods_multimodal", "integrations", "mm_adapters", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# A format that shows a sign shows numbers of both signs; "z" drops the one of zero.
SIGNED = re.compile(r"[^{}]?[<>=^]?\+(z)?#?0?\d*,?(\.\d+)?[efg%]")
NEGATIVE_ZERO = re.compile(r"[-−]0?\.?0*(%|e[+-]\d+)?(?![\d.])")


def specs(tree: ast.AST) -> list[tuple[int, str]]:
    """Every format in a module: of f-strings, and strings that are nothing but a format."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FormattedValue) and isinstance(node.format_spec, ast.JoinedStr):
            parts = [v.value for v in node.format_spec.values if isinstance(v, ast.Constant)]
            found.append((node.lineno, "".join(map(str, parts))))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append((node.lineno, node.value))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_format_with_a_sign_drops_that_of_zero(path: Path) -> None:
    for line, spec in specs(ast.parse(path.read_text("utf-8"))):
        match = SIGNED.fullmatch(spec)
        assert match is None or match[1], f'line {line}: "{spec}" prints -0.00; write a z after the sign'


def shown(figure: Figure) -> list[str]:
    figure.canvas.draw()
    return [line for text in figure.findobj(Text) for line in text.get_text().splitlines()]


def test_the_patterns_see_what_they_are_for() -> None:
    for spec in ("+.2f", ">+8.3f", "+.0%", "+.3g"):
        assert SIGNED.fullmatch(spec)
        assert not SIGNED.fullmatch(spec)[1]
    assert SIGNED.fullmatch("+z.2f")[1] == "z"
    for text in ("-0.00", "−0.0", "-0%", "-0", "-0.0e+00"):
        assert NEGATIVE_ZERO.search(text), text
    for text in ("-0.01", "0.00", "+0.00", "-1", "10-20", "-0.05 to +0.00"):
        assert not NEGATIVE_ZERO.search(text), text
    assert f"{torch.tensor(-1e-4).item():+z.2f}" == "+0.00"


def test_cells_of_small_negative_numbers_say_zero() -> None:
    values = torch.tensor([[-0.001, -0.004], [0.001, -0.5]])
    zeros = torch.zeros(4)
    record = Effects(
        values.flatten()[:, None].expand(4, 4).contiguous(),
        zeros,
        zeros + 1,
        torch.zeros(4, 4),
        ((0,), (0,), (1,), (1,)),
        ((),) * 4,
        ((0, 1), (2, 3)) * 2,
        "what",
        "metric",
        ("turned",) * 4,
        (False,) * 4,
    )
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    effect_grid(record, left)
    heatmap(values, right, unit="x", signed=True, write="+z.2f")
    lines = shown(figure)
    assert {"+0.00", "-0.50", "+0.00 to +0.00"} <= set(lines)
    assert not [line for line in lines if NEGATIVE_ZERO.search(line)]
    assert "-0.0," not in f"{rounded(values, 2)},"
    assert rounded(values, 2)[1] == [0.0, -0.5]
