"""One `run` of a traced model, wherever its block runs.

In the model's own process (on this machine, or as a trusted job) the run's reads and edits are hooks on the
model's points, as they are on a HookedModel's. In a service's sandbox the block runs in another process than
the model: there each site is followed by a worker of its own, which requests its values one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor

from mm_adapters.nnsight_engine.interleaver import current
from mm_adapters.nnsight_engine.protocol import SiteModel
from mm_adapters.runs.lens import Edit, Read
from mm_adapters.runs.session import Session


class Recorder:
    """A `Session` of a traced model, made inside the traced block.

    Raises: MissingSiteError for a site there is none of; NotImplementedError for gradients in a sandbox.
    """

    def __init__(
        self,
        model: SiteModel,
        read: list[Read],
        edit: list[Edit],
        grad_of: Callable[[Any], Tensor] | None,
        arguments: dict[str, Any],
        generating: bool = False,
    ) -> None:
        self._model = model
        self._grad_of = grad_of
        self._arguments = arguments
        keep_graph = grad_of is not None
        if keep_graph and not model.in_process:
            raise NotImplementedError(
                "This service runs blocks in a sandbox, apart from the model, where there are no "
                "gradients. Run it here, or as a trusted job on a service of your own."
            )
        guided = None if model.in_process else (lambda guidance: model.is_guided(arguments, guidance))
        self.session = Session(
            model.wrapped, model.sitemap, model.points, read, edit, keep_graph, guided, generating
        )
        self.session.arguments = arguments

    @property
    def followed(self) -> list[str]:
        """The sites that need a worker of their own."""
        return [] if self._model.in_process else self.session.sites_used()

    def record(self, tracer: Any) -> dict[str, Any]:
        """The fields of a `Run`, when the run has ended."""
        in_process = self._model.in_process
        with (
            grad_mode(self.session.keep_graph) if in_process else nullcontext(),
            self.session.attached(self._arguments) if in_process else nullcontext(),
        ):
            output = tracer.result
            return vars(self.session.result(output, self._grad_of))

    def follow(self, name: str) -> None:
        """Requests one site's values until the run ends, and calls the hooks with each."""
        envoy, hooks = self._model.envoy(name), list(self.session.hooks(name))
        tower = self._model.sitemap[name].tower
        clock, calls_a_turn = self.session.clocks[tower], self.session.calls_a_turn(tower)
        mediator = current(name)
        before, last = 0, 0
        for call in count():
            mediator.iteration = call
            try:
                value = served = envoy.output
            except OutOfOrderError:
                return
            length = value.shape[1] if value.ndim > 1 else 0
            # With a key-value cache a later call holds new positions only; without one it holds all.
            before = 0 if call and length == last + 1 else before + last
            clock.moved_to(*divmod(call, calls_a_turn), before)
            last = length
            for hook in hooks:
                new = hook(None, (value,), value)
                value = value if new is None else new
            if value is not served:
                envoy.output = value


@contextmanager
def grad_mode(keep: bool) -> Iterator[None]:
    """Gradients on or off for the model too, which runs while the block's request is pending."""
    with torch.set_grad_enabled(keep):
        yield
