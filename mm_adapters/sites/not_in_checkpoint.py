"""Which weights of a model its checkpoint lacked: written on the model, so that a copy says it too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

_NAME = "_not_in_checkpoint"


def note_missing(model: nn.Module, names: Iterable[str]) -> None:
    """Writes on a model which weights its checkpoint lacked: they are random."""
    model.__dict__[_NAME] = tuple(sorted(names))


def random_weights(model: Any) -> tuple[str, ...]:
    """The weights that a checkpoint loaded with `strict=False` lacked; of any other model none."""
    return getattr(model, "__dict__", {}).get(_NAME, ())


def random_note(names: Sequence[str]) -> str:
    """What a model's repr says of them; nothing if there are none."""
    return f"random, not in the checkpoint: {', '.join(names)}" if names else ""
