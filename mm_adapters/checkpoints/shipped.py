"""The checkpoints that ship with the package, by name."""

from __future__ import annotations

from pathlib import Path

from mm_adapters._errors import InputError

NAMES = ("tiny-clip", "tiny-llava", "tiny-sd")

_MODELS = Path(__file__).parents[1] / "zoo" / "models"


def path(name: str) -> Path:
    """The folder of one of the zoo's checkpoints, for any `from_pretrained`."""
    if name not in NAMES:
        raise InputError(f"zoo: no model {name!r}; there is {', '.join(NAMES)}.")
    return _MODELS / name
