"""One `run` of a traced model, written to work wherever its block runs.

In the model's own process (here, or as a trusted job) the run's reads and edits hang on the model's
points, as they do on a HookedModel's. In a service's sandbox the block runs in another process than
the model: there each site is followed by a worker of its own, which asks for its values one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor

from mm_adapters.nnsight_engine.interleaver import current
from mm_adapters.runs.lens import Edit, Read
from mm_adapters.runs.session import Session

if TYPE_CHECKING:
    from mm_adapters.traced import TracedModel


class Recorder:
    """A `Session` of a traced model, made inside the traced block.

    Raises: MissingSiteError for a site there is none of; NotImplementedError for gradients in a sandbox.
    """

    def __init__(
        self,
        model: TracedModel,
        read: list[Read],
        edit: list[Edit],
        grad_of: Callable[[Any], Tensor] | None,
        arguments: dict[str, Any],
    ) -> None:
        self._model = model
        self._grad_of = grad_of
        self._arguments = arguments
        keep = grad_of is not None
        if keep and not model.is_here:
            raise NotImplementedError(
                "This service runs blocks in a sandbox, apart from the model, where there are no "
                "gradients. Run it here, or as a trusted job on a service of your own."
            )
        guided = None if model.is_here else (lambda guidance: model.is_guided(arguments, guidance))
        self.session = Session(model.wrapped, model.sitemap, model.points, read, edit, keep, guided)
        self.session.arguments = arguments

    @property
    def followed(self) -> list[str]:
        """The sites that need a worker of their own."""
        return [] if self._model.is_here else self.session.sites_used()

    def record(self, tracer: Any) -> dict[str, Any]:
        """Waits for the run to end; then what `Run` is made of."""
        here = self._model.is_here
        with (
            grad_mode(self.session.keep_graph) if here else nullcontext(),
            self.session.attached(self._arguments) if here else nullcontext(),
        ):
            output = tracer.result
            return vars(self.session.result(output, self._grad_of))

    def follow(self, name: str) -> None:
        """Asks for one site's values until the run ends, and does with each what the hooks would."""
        envoy, hooks = self._model.envoy(name), list(self.session.hooks(name))
        clock = self.session.clocks[self._model.sitemap[name].tower]
        mediator = current(name)
        before, last = 0, 0
        for call in count():
            mediator.iteration = call
            try:
                value = was = envoy.output
            except OutOfOrderError:
                return
            length = value.shape[1] if value.ndim > 1 else 0
            # With a key-value cache a later call holds new positions only; without one it holds all.
            before = 0 if call and length == last + 1 else before + last
            clock.call, clock.offset, last = call, before, length
            for hook in hooks:
                new = hook(None, (value,), value)
                value = value if new is None else new
            if value is not was:
                envoy.output = value


@contextmanager
def grad_mode(keep: bool) -> Iterator[None]:
    """Gradients on or off for the model too: it runs while the block waits."""
    with torch.set_grad_enabled(keep):
        yield
