"""Weights for modules that were built without."""

from __future__ import annotations

from torch import Tensor, nn


def load_weights_into(empty: nn.Module, full: nn.Module) -> None:
    """Gives a module on the meta device the tensors of another of the same build; tied ones stay tied.

    What from_pretrained adds to a model besides (its configuration as read, how it generates) too.
    """
    theirs = dict(full.named_modules())
    for name, module in empty.named_modules():
        other = theirs[name]
        module._parameters.update(other._parameters)
        module._buffers.update(other._buffers)
        for key, value in vars(other).items():
            if key in ("config", "generation_config") or isinstance(value, Tensor):
                module.__dict__[key] = value
    empty.train(full.training)
