"""Modules run as they are written: compiled code has no hook that was put on later, and a block that is run
again for its gradients would be without its hooks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether any of these was compiled in place, or stands in torch.compile."""
    if "torch._dynamo" not in sys.modules:
        return False
    return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in modules)


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled code is left alone inside, and what it was compiled from runs."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def without_checkpoints(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, none of these blocks is run a second time in the backward pass, if there will be one."""
    parts = modules if torch.is_grad_enabled() else ()
    switched = [part for part in parts if part.__dict__.get("gradient_checkpointing")]
    for part in switched:
        part.__dict__["gradient_checkpointing"] = False
    try:
        yield
    finally:
        for part in switched:
            part.__dict__["gradient_checkpointing"] = True
