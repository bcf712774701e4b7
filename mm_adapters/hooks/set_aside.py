"""A run inside a run: what the outer one has on the model is off while the inner one goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

from torch import nn

from mm_adapters.hooks.kept import Kept
from mm_adapters.hooks.module_hooks import AttentionHook, ModuleHook

_OURS = "mm_adapters."


@contextmanager
def values_set_aside(module_hooks: Iterable[ModuleHook]) -> Iterator[None]:
    """Inside, module hooks keep nothing of the forward that is under way; afterwards they do again."""
    with ExitStack() as stack:
        for module_hook in module_hooks:
            holders = (module_hook, *module_hook.readers)
            for kept in {id(k): k for h in holders for k in vars(h).values() if isinstance(k, Kept)}.values():
                stack.callback(setattr, kept, "value", kept.value)
                kept.value = None
            if isinstance(module_hook, AttentionHook):
                stack.enter_context(module_hook.paused())
        yield


@contextmanager
def hooks_set_aside(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, no torch hook of this package is on the modules."""
    changed: list[tuple[Any, dict[Any, Any]]] = []
    try:
        for module in modules:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                ours = [at for at, hook in hooks.items() if _is_ours(hook)]
                if ours:
                    changed.append((hooks, dict(hooks)))
                    for at in ours:
                        del hooks[at]
        yield
    finally:
        for hooks, before in changed:
            since = [at for at in hooks if at not in before]
            hooks.update(before)
            for at in (*before, *since):  # In the order they were put on.
                hooks.move_to_end(at)


@contextmanager
def loop_set_aside(pipeline: Any) -> Iterator[None]:
    """Inside, a pipeline in the middle of its loop may be run: what that loop keeps is put back afterwards.

    It keeps its options in the pipeline's private attributes, and how far it is in its schedulers.
    """
    schedulers = [c for c in pipeline.components.values() if hasattr(c, "set_timesteps")]
    kept = [{name: copy(value) for name, value in vars(s).items()} for s in schedulers]
    options = {name: value for name, value in vars(pipeline).items() if name.startswith("_")}
    for scheduler in schedulers:
        vars(scheduler).pop("step", None)  # It counts the outer run's steps.
    try:
        yield
    finally:
        for scheduler, before in zip(schedulers, kept, strict=True):
            vars(scheduler).clear()
            vars(scheduler).update(before)
        for name in [n for n in vars(pipeline) if n.startswith("_")]:
            del vars(pipeline)[name]
        vars(pipeline).update(options)


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_OURS)
