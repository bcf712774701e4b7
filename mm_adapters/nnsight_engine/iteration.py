"""Loops over steps that end when the run ends, and the tracers that have them."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType
from typing import Any

from nnsight.intervention.editing import EditingTracer
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.iterator import Iterations
from nnsight.intervention.tracer import InterleavingTracer

from mm_adapters._errors import InputError
from mm_adapters.nnsight_engine.interleaver import END, STEP, current


class Steps(Iterations):
    """Steps of a run: a slice ends when the run does, as Python's do; an index must be there.

    nnsight's own loop ends by an error inside the block, so that nothing after it is run.
    """

    def __iter__(self) -> Iterator[int]:
        mediator = current("tracer.iter")
        previous = mediator.iteration, mediator.__dict__.get("step")
        try:
            for step in self._indices():
                if step < 0:
                    raise InputError(f"Steps are counted from 0; there is no step {step}.")
                mediator.iteration = step
                mediator.__dict__["step"] = None
                if step > 0 and Mediator.value(STEP) == END:
                    if self.must_exist(step):
                        raise IndexError(f"Step {step} was asked for, and this run did not make it.")
                    return
                mediator.__dict__["step"] = step
                yield step
        finally:
            mediator.iteration, mediator.__dict__["step"] = previous

    def __getitem__(self, key: Any) -> Steps:
        if isinstance(key, slice):
            steps = Steps(key.start or 0, key.stop)
            if key.step not in (None, 1):
                raise InputError("tracer.iter takes no stride. Give the steps: tracer.iter[[0, 2, 4]].")
            steps.open = True
            return steps
        return Steps(steps=list(key) if isinstance(key, list | tuple) else [key])

    open = False

    def must_exist(self, step: int) -> bool:
        """Whether a run without this step is an error."""
        return not self.open


class SiteTracer(InterleavingTracer):
    """nnsight's tracer, with loops over steps that end when the run does, one run at a time on a model.

    Its arguments are checked.
    """

    def __init__(self, envoy: Any, fn: Any, *args: Any, backend: Any = None, **kwargs: Any) -> None:
        _check(envoy, fn, args, kwargs)
        super().__init__(envoy, fn, *args, backend=backend, **kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        """As nnsight's. Raises: InputError for what the call does not take."""
        _check(self.envoy, self.fn, args, kwargs)
        return super().invoke(*args, **kwargs)

    def execute(self, code: CodeType) -> None:
        envoy: Any = self.envoy
        model = envoy.root
        with model.turn(), model.running():
            super().execute(code)

    @property
    def iter(self) -> Steps:
        return Steps()


class SiteEditor(EditingTracer):
    """nnsight's editing tracer, with loops over steps that end when the run does."""

    @property
    def iter(self) -> Steps:
        return Steps()


def _check(envoy: Any, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A whole model checks what its call is given; a part of one is called with the model's own tensors."""
    if hasattr(type(envoy), "check_traced"):
        envoy.check_traced(fn, args, kwargs)
