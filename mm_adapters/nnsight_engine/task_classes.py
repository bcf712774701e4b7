"""nnsight's own TransformersModel of a name, with a transformers that names a task's class by text (5.23 on).

nnsight 0.8.1 (modeling/transformers.py, _loaded_preprocessors) reads flags off the class of a task's
pipeline. From transformers 5.23 on the table of tasks holds the class's path instead, which has no flags, so
nnsight loads no tokenizer and no processor, and every model of a name without `dispatch=True` fails. Here the
class is put into the table first, for the one task that is asked for; transformers takes either. TracedModel
has no need of it. It ends with the nnsight that reads the path.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

from nnsight.modeling.transformers import TransformersModel

_theirs = TransformersModel._loaded_preprocessors


def resolve_task(task: str | None) -> None:
    """Puts the class of a task's pipeline where transformers' table has its path."""
    from transformers.pipelines import check_task

    with suppress(KeyError):  # No such task: nnsight then looks for every preprocessor.
        _, entry, _ = check_task(task)  # type: ignore[arg-type]
        if isinstance(path := entry["impl"], str):
            module, _, name = path.rpartition(".")
            entry["impl"] = getattr(importlib.import_module(module), name)


def _loaded_preprocessors(self: Any) -> set[str]:
    resolve_task(self.task)
    return _theirs(self)


TransformersModel._loaded_preprocessors = _loaded_preprocessors  # type: ignore[method-assign]
