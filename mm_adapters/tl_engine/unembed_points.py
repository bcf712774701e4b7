"""TransformerLens' points around a language tower's unembedding: `unembed.hook_in` and `unembed.hook_out`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mm_adapters.tl_engine.derived_points import DerivedPoint


def unembed_points(module_of: Callable[[], Any]) -> dict[str, DerivedPoint]:
    """Both, by name: what the module that makes logits is given, and what it gives. Hooks may change either.

    Args:
        module_of: The model's module as it is now.
    """

    @contextmanager
    def given() -> Iterator[None]:
        def show(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (entering.shown(args[0])[0], *args[1:])

        handle = module_of().register_forward_pre_hook(show)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def gives() -> Iterator[None]:
        def show(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            return leaving.shown(out)[0]

        handle = module_of().register_forward_hook(show)
        try:
            yield
        finally:
            handle.remove()

    entering, leaving = (
        DerivedPoint("unembed.hook_in", None, given),
        DerivedPoint("unembed.hook_out", None, gives),
    )
    return {point.shown_name: point for point in (entering, leaving)}
