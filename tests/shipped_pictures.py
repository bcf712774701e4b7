"""The pictures that the README and the docs show, as the commands make them today.

python -m tests.shipped_pictures [NAME ...]

draws them again with the shipped weights and writes down beside it what each showed and of which weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.figure import Figure

from mm_adapters import cli
from mm_adapters.storage.fingerprint import of_module
from mm_adapters.zoo import path
from mm_adapters.zoo.models_at import load
from tests.methods.plots.shown import described, of_figure

FOLDER = Path(__file__).parents[1] / "examples" / "pictures"
SHOWN = Path(__file__).with_name("shipped_pictures.json")
COMMANDS: dict[str, tuple[str, ...]] = {
    "report_tiny-clip": ("report", "--model", "tiny-clip"),
    "report_tiny-llava": ("report", "--model", "tiny-llava"),
    "report_tiny-sd": ("report", "--model", "tiny-sd"),
    "words_tiny-sd": ("words", "--model", "tiny-sd"),
    "trace_tiny-sd": ("trace", "--word", "red", "--other", "blue"),
}
# Those that take seconds are drawn again whenever the tests run.
QUICK = ("report_tiny-clip", "report_tiny-llava")


def model_of(name: str) -> str:
    """The zoo's model that a picture is of."""
    return name.rpartition("_")[2]


def weights_of(model: str) -> dict[str, Any]:
    """The fingerprints of the shipped weights."""
    loaded, _ = load(path(model), model)
    parts = loaded.components if hasattr(loaded, "components") else {"model": loaded}
    modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    return {name: of_module(part)["weights"] for name, part in sorted(modules.items())}


def drawn(name: str, file: Path) -> Any:
    """Runs the command, which writes the picture there, and says what it showed."""
    seen: list[Any] = []
    save = Figure.savefig

    def kept(figure: Figure, *args: Any, **kwargs: Any) -> None:
        seen.append(described(of_figure(figure)))
        save(figure, *args, **kwargs)

    with mock.patch.object(Figure, "savefig", kept):
        code = cli.main([*COMMANDS[name], "--out", str(file)])
    assert code == 0, COMMANDS[name]
    return seen[-1]


def main(names: list[str]) -> None:
    """Draws these pictures, or all."""
    stored = json.loads(SHOWN.read_text("utf-8")) if SHOWN.exists() else {}
    for name in names or COMMANDS:
        shows = drawn(name, FOLDER / f"{name}.png")
        stored[name] = {"weights": weights_of(model_of(name)), "shows": shows}
        SHOWN.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", "utf-8")
        sys.stdout.write(f"{FOLDER / name}.png\n")


if __name__ == "__main__":
    main(sys.argv[1:])
