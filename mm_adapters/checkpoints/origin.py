"""Which checkpoint a model was loaded from, as a service is told to load it too."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_adapters._errors import InputError

# About this machine, or part of a request's environment: not of what a checkpoint is.
_HERE = (
    "token", "cache_dir", "local_files_only", "force_download", "attn_implementation",
    "device_map", "max_memory", "offload_folder", "offload_buffers", "offload_state_dict",
)  # fmt: skip


@dataclass(frozen=True)
class CheckpointRef:
    """What `load` was given: a shipped name, a folder or an id on the hub, and the options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> CheckpointRef | None:
        """None if an option is an object, which another process cannot be told."""
        name = os.path.abspath(name) if os.path.isdir(name) else name
        named = {k: _told(v) for k, v in options.items() if k not in _HERE}
        plain = all(v is None or isinstance(v, str | int | float | bool) for v in named.values())
        return cls(name, named) if plain else None

    def key(self, task: str | None = None) -> str:
        """As JSON, under the names that NDIF's own tools read (`repo_id`, `revision`, `task`)."""
        named = {} if task is None else {"task": _canonical(task)}
        return json.dumps({"repo_id": self.name, "revision": None, **self.options, **named}, sort_keys=True)

    @classmethod
    def parse(cls, key: str) -> CheckpointRef:
        """The inverse of `key`. Raises: InputError if it is none."""
        data = json.loads(key)
        if not isinstance(data, dict) or not isinstance(data.get("repo_id"), str):
            raise InputError(f"{key!r} names no checkpoint: it has no repo_id.")
        name = data.pop("repo_id")
        return cls(name, {k: v for k, v in data.items() if v is not None})


def _canonical(task: str) -> str:
    """transformers' own name of a task that has several."""
    from transformers.pipelines import TASK_ALIASES

    return TASK_ALIASES.get(task, task)


def _told(value: Any) -> Any:
    """A class of a library by its name there, which `load` takes too."""
    library = sys.modules.get(getattr(value, "__module__", "").partition(".")[0])
    is_theirs = isinstance(value, type) and getattr(library, value.__name__, None) is value
    return value.__name__ if is_theirs else value
