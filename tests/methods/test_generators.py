"""A seed is the generator torch makes of it, and several numbers are a seed written out by hand."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

from methods_multimodal.core.generators import generator, mixed

ROOT = Path(__file__).parents[2] / "methods_multimodal"


def test_a_seed_is_torchs_own_and_a_generator_is_itself() -> None:
    wanted = torch.rand(5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.rand(5, generator=generator(3)), wanted)
    mine = torch.Generator().manual_seed(3)
    assert generator(mine) is mine


def test_several_numbers_are_digits_of_one_seed() -> None:
    by_hand = (((5 + 1) * 1_000_003 + (7 + 1)) * 1_000_003 + (0 + 1)) % (2**63 - 25)
    assert mixed(5, 7, 0).initial_seed() == by_hand
    seeds = {mixed(*numbers).initial_seed() for numbers in ((0,), (0, 0), (0, 1), (1, 0), (1,))}
    assert len(seeds) == 5


def test_no_method_makes_or_seeds_a_generator_by_itself() -> None:
    for path in sorted(ROOT.rglob("*.py")):
        if path.name == "generators.py":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in ("Generator", "manual_seed"), f"{path}:{node.lineno}"
