"""`mm-interp sae train`: what it hands to the training, what it prints, and what it refuses beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from integrations import commands
from integrations import sae_lens as mm_sae
from mm_adapters import InputError, cli

CONFIG = {"architecture": "standard", "d_in": 4, "d_sae": 8, "l1_coefficient": 0.5}
TRAINER = {"train_batch_size_samples": 8, "total_training_samples": 64, "lr": 1e-3}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Training that notes what it was asked for."""
    noted: dict[str, Any] = {}

    def train(model: Any, site: str, cfg: Any, **options: Any) -> Any:
        noted.update(options, model=model, site=site, cfg=cfg)
        metadata = SimpleNamespace(hook_name=site, l0=2.34, num_dead_features=3)
        return SimpleNamespace(cfg=SimpleNamespace(metadata=metadata, d_sae=cfg.d_sae))

    monkeypatch.setattr(mm_sae, "train", train)
    monkeypatch.setattr(commands, "load", lambda name, device: f"{name} on {device}")
    return noted


def written(folder: Path, settings: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return path


def run(folder: Path, settings: Any, *options: str) -> Result:
    config = written(folder, settings)
    arguments = [
        "sae",
        "train",
        "--site",
        "vision.blocks.0.hook_resid_post",
        "--config",
        str(config),
        *options,
    ]
    return CliRunner().invoke(cli.build(), arguments)


def pictures(folder: Path, *broken: str) -> Path:
    at = folder / "pictures"
    at.mkdir(exist_ok=True)
    for i in range(3):
        Image.new("RGB", (4, 4)).save(at / f"{i}.png")
    for name in broken:
        (at / name).write_bytes(b"no picture")
    return at


def test_pictures_and_settings_reach_the_training(asked: dict[str, Any], tmp_path: Path) -> None:
    at = pictures(tmp_path, "bad.png")
    options = [
        "--images",
        str(at),
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "2-4",
        "--seed",
        "7",
        "--tokens",
        "image",
    ]
    result = run(tmp_path, {**CONFIG, "trainer": TRAINER}, *options, "--skip-unreadable", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert [Path(p).name for p in asked["data"]] == ["0.png", "1.png", "2.png"]
    assert (asked["steps"], asked["seed"], asked["tokens"]) == ([2, 3, 4], 7, "image")
    assert asked["folder"] == tmp_path / "out"
    assert asked["model"] == "tiny-clip on cpu"
    assert (asked["cfg"].d_sae, asked["cfg"].l1_coefficient) == (8, 0.5)
    assert (asked["trainer"].total_training_samples, asked["trainer"].lr) == (64, 1e-3)
    lines = result.output.splitlines()
    assert lines[0].startswith(f"skipped {at / 'bad.png'}: ")
    assert lines[1] == "vision.blocks.0.hook_resid_post: 8 latents, L0 2.3, 3 dead"
    assert lines[2] == f"wrote {tmp_path / 'out' / 'sae'}"


def test_prompts_are_the_lines_that_hold_something(asked: dict[str, Any], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat \n\n  a dog\n")
    result = run(tmp_path, CONFIG, "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--steps", "3")
    assert result.exit_code == 0, result.output
    assert (asked["data"], asked["steps"], asked["trainer"]) == (["a cat", "a dog"], [3], None)
    run(tmp_path, CONFIG, "--prompts", str(prompts), "--out", str(tmp_path / "out"))
    assert asked["steps"] is None


def test_what_cannot_be_trained_on_is_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    empty, taken = tmp_path / "empty.txt", tmp_path / "taken"
    empty.write_text(" \n")
    taken.write_text("x")
    at = str(pictures(tmp_path))
    for options, said in (
        ([], "Pass --images FOLDER or --prompts FILE, one of the two."),
        (
            ["--images", at, "--prompts", str(empty)],
            "Pass --images FOLDER or --prompts FILE, one of the two.",
        ),
        (["--prompts", str(tmp_path / "none.txt")], f"There is no file {tmp_path / 'none.txt'}."),
        (["--prompts", str(empty)], f"{empty} holds no prompt: give one a line."),
        (["--images", at, "--out", str(taken)], f"--out {taken} is a file; give a folder."),
        (["--images", at, "--steps", "-3"], "--steps -3: a number, or a range like 0-9."),
        (["--images", at, "--steps", "1-x"], "--steps 1-x: a number, or a range like 0-9."),
    ):
        result = run(tmp_path, CONFIG, *options)
        assert isinstance(result.exception, InputError | FileNotFoundError | SystemExit), options
        assert said in (str(result.exception) + result.output), options
    assert not asked


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{", "is not valid YAML"),
        ("- 1", "needs a line 'architecture: batchtopk'"),
        ({"d_in": 4}, "needs a line 'architecture: batchtopk'"),
        ({**CONFIG, "architecture": "none"}, "There is no architecture 'none' to train; there is "),
        ({**CONFIG, "architecture": ["standard"]}, r"There is no architecture \['standard'\] to train"),
        ({**CONFIG, "trainer": [1]}, r"trainer: holds fields and values, not \[1\]"),
        ("architecture: standard\n3: 4", "A field's name is a text, not 3"),
        ({**CONFIG, "d_inn": 4}, "d_in"),
        ({"architecture": "standard", "d_in": 4}, "d_sae"),
        ({**CONFIG, "trainer": {"lr": 0.1}}, "trainer: needs total_training_samples"),
    ],
)
def test_settings_that_are_none_are_refused(settings: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        commands.parse_config(commands.read_config(written(tmp_path, settings)))


def test_a_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no config"):
        commands.read_config(tmp_path / "none.yaml")
    cfg, trainer = commands.parse_config(dict(CONFIG))
    assert (cfg.d_in, trainer) == (4, None)
