"""TransformerLens' components with nothing computed again: structure and weights, and the model's own call.

Their own HookPoints are inputs and outputs of modules. What is inside (patterns, heads, norms, the stream
between two branches) are this package's points, which are attached beside them and act on the module
underneath; so a HookPoint that would never fire, or whose edit would be lost, is taken away.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    MLPBridge,
    NormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

_OWN = {"hook_in", "hook_out"}


class Part(nn.Module):
    """A module that holds points where the bridge has no component."""

    def get_hooks(self) -> dict[str, HookPoint]:
        """Its points, by their name."""
        return {name: point for name, point in self.named_children() if isinstance(point, HookPoint)}


def bare(component: GeneralizedComponent, keep: Collection[str] = _OWN) -> GeneralizedComponent:
    """The component without HookPoints and aliases but those of its input and output."""
    component.hook_aliases = {}
    for name in set(component._hook_registry) - set(keep):
        delattr(component, name)
        del component._hook_registry[name]
    return component


class Inner(GeneralizedComponent):
    """A module called by another name than its own (a VQ model's `encode`): its input is no site."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call."""
        assert self.original_component is not None
        return self.original_component(*args, **kwargs)


class Attention(AttentionBridge):
    """TransformerLens' weights of an attention, around the model's own call."""

    supports_split_qkv_fork = False
    forward = GeneralizedComponent.forward


class NormPart(NormalizationBridge):
    """A norm's gain and offset, around the model's own call."""

    forward = GeneralizedComponent.forward


class MLP(MLPBridge):
    """TransformerLens' weights of an MLP, around the model's own call."""

    forward = GeneralizedComponent.forward


class Unembedding(UnembeddingBridge):
    """The unembedding as it is: TransformerLens' gives it a bias of zeros."""

    forward = GeneralizedComponent.forward

    def set_original_component(self, original_component: nn.Module) -> None:
        """As of every component."""
        GeneralizedComponent.set_original_component(self, original_component)


class Block(BlockBridge):
    """A block, around the model's own call: what that returns is returned."""

    @staticmethod
    def _is_standalone_hidden_state_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        # TransformerLens gives a tuple to who calls a block with one tensor and nothing else, which
        # is how some models call theirs.
        return False

    def _filter_kwargs_for_forward(self, kwargs: dict[str, Any], len_args: int = 0) -> dict[str, Any]:
        return kwargs  # A model gives its blocks what they take, if under a name that is renamed.

    def _maybe_wire_capture_hooks(self) -> None:
        pass  # For the copies of a block's input that `bare` has taken away.
