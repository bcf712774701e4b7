"""Real checkpoints from the numbers published with them: opened without weights, their sites listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import mm_adapters as mm
from mm_adapters import cli

PUBLISHED = sorted((Path(__file__).parent / "published").glob("*.json"))


def written(published: Path, folder: Path) -> dict[str, Any]:
    """Writes a checkpoint's configuration files; gives what its makers say of it."""
    card = json.loads(published.read_text())
    for name, config in card["files"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    return card["expect"]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_there_are_at_least_ten_and_several_are_vision_language_models() -> None:
    assert len(PUBLISHED) >= 20
    assert sum('"text_config"' in p.read_text() and '"clip"' not in p.read_text() for p in PUBLISHED) >= 8


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: p.stem)
def test_a_checkpoint_opens_on_the_meta_device_as_its_makers_say(published: Path, tmp_path: Path) -> None:
    expect = written(published, tmp_path)
    model = mm.load(tmp_path, device="meta")
    for key, want in expect.items():
        if key == "parameters":
            # A whole number is what the checkpoint's own index counts, and is met; else it is a card's.
            assert count(model.wrapped) == pytest.approx(want, rel=0 if isinstance(want, int) else 0.003)
        elif key == "denoiser parameters":
            found = count(model.sitemap.towers["denoiser"].module)
            assert found == pytest.approx(want, rel=0 if isinstance(want, int) else 0.03)
        elif key == "pattern":
            tower, n_heads = want
            axes = next(
                s.axes
                for s in model.sitemap
                if s.name.startswith(f"{tower}.") and s.name.endswith("hook_pattern")
            )
            assert axes[1] == f"head={n_heads}"
        else:
            tower, stack = key.split(".")
            assert len(model.sitemap.towers[tower].stacks[stack]) == want, key
    assert all(p.is_meta for t in model.sitemap.towers.values() for p in t.module.parameters())


def test_the_command_lists_the_sites_of_a_model_bigger_than_memory(tmp_path: Path) -> None:
    written(next(p for p in PUBLISHED if p.stem == "flux.1-dev"), tmp_path)
    command = ["sites", str(tmp_path), "denoiser.single_blocks.37.*", "--meta"]
    done = CliRunner().invoke(cli.build([]), command)
    assert done.exit_code == 0, done.output
    assert "denoiser.single_blocks.37.attn.hook_pattern_text" in done.output
    assert "head=24" in done.output
