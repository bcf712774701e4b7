"""The gradient of a run's scalar at what was read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mm_adapters._errors import InputError
from mm_adapters.runs.lens import Read


def check_grad_of(grad_of: Any) -> None:
    """Raises: InputError for what is no function."""
    if grad_of is not None and not callable(grad_of):
        raise InputError(f"grad_of={grad_of!r}: it is a function of the output that gives one number.")


def check_reads(reads: Sequence[Read]) -> None:
    """Raises: InputError if a run with `grad_of` would give no gradient, or one of a reduced value."""
    for read in reads:
        if read.reduce is not None and read.grad:
            raise InputError(
                f"{read.site}: a gradient is at a whole value, and this read reduces it. Leave reduce out "
                "and reduce the gradient, or say grad=False to read it without one."
            )
    if not any(read.grad for read in reads):
        raise InputError("grad_of gives gradients at what is read, and nothing is. Name the sites in read=.")


def scalar_of(grad_of: Callable[[Any], Any], output: Any) -> Tensor:
    """What `grad_of` gives of an output.

    Raises: InputError if it is no single real number that autograd follows.
    """
    with torch.enable_grad():
        scalar = grad_of(output)
    if not isinstance(scalar, Tensor):
        raise InputError(
            f"grad_of gave {'nothing' if scalar is None else f'a {type(scalar).__name__}'}. It gives a "
            "tensor with one number, computed from the output: not float(...) or .item() of it."
        )
    if scalar.numel() != 1 or scalar.is_complex():
        raise InputError(
            f"grad_of gave {scalar.dtype} of shape {tuple(scalar.shape)}. It gives one real number."
        )
    if not scalar.requires_grad:
        raise InputError(
            "grad_of gave a number that autograd does not follow to the output: it was detached, computed "
            "under no_grad, or is of integers. Compute it from the output with torch."
        )
    return scalar


def gradients(scalar: Tensor, wholes: Sequence[Sequence[Tensor]]) -> list[list[Tensor | None]]:
    """The derivatives by each value of each read; None where the scalar does not depend on it."""
    flat = [value for values in wholes for value in values]
    derivatives = iter(torch.autograd.grad(scalar, flat, allow_unused=True)) if flat else iter(())
    return [[next(derivatives) for _ in values] for values in wholes]


@contextmanager
def differentiable(arguments: Mapping[str, Any], weight: Tensor) -> Iterator[dict[str, Any]]:
    """Autograd is on inside, whatever is around; gives the arguments as tensors that it can follow.

    Raises: InputError if `weight`, one of the model's, was made in inference mode.
    """
    if weight.is_inference():
        raise InputError(
            "The model's weights were made under torch.inference_mode(), and autograd follows none of them. "
            "Load the model outside of it."
        )
    with torch.inference_mode(False), torch.enable_grad():
        yield {k: _followed(v) for k, v in arguments.items()}


def _followed(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
