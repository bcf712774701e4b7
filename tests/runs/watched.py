"""What a model does by itself, seen with plain torch hooks: what runs are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from tiny_case import Case
from torch import Tensor, nn

Engine = Literal["hooked", "nnsight"]
ENGINES: tuple[Engine, ...] = ("hooked", "nnsight")


def output_of(case: Case, inputs: dict[str, Any] | None = None) -> Any:
    """The wrapped model's own output, with no engine in between."""
    arguments = dict(case.inputs if inputs is None else inputs)
    if "seed" in arguments:
        arguments["generator"] = torch.Generator().manual_seed(arguments.pop("seed"))
    with torch.no_grad():
        return case.model(**arguments)


def first_tensor(output: Any) -> Tensor:
    """A module's output, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


def calls_of(module: nn.Module, case: Case, inputs: dict[str, Any] | None = None) -> list[Tensor]:
    """What the module gives at each of its calls in the model's own run."""
    calls: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, a, output: calls.append(first_tensor(output).clone()))
    try:
        output_of(case, inputs)
    finally:
        handle.remove()
    return calls


def edited_by_hook(module: nn.Module, case: Case, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """The head of the model's own output when a plain hook replaces what the module gives."""

    def replace(m: nn.Module, args: Any, output: Any) -> Any:
        new = fn(first_tensor(output))
        return new if isinstance(output, Tensor) else (new, *output[1:])

    handle = module.register_forward_hook(replace)
    try:
        return case.head(output_of(case))
    finally:
        handle.remove()


@contextmanager
def never_called(model: Any) -> Iterator[None]:
    """Nothing of the model runs inside."""
    modules = [model] if isinstance(model, nn.Module) else [
        m for m in model.components.values() if isinstance(m, nn.Module)
    ]  # fmt: skip
    ran: list[str] = []
    handles = [m.register_forward_pre_hook(lambda m, a: ran.append(type(m).__name__)) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert not ran
