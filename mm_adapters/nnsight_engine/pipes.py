"""transformers' whole pipeline around a traced model, with the block in it; several inputs as one batch."""

from __future__ import annotations

from typing import Any, no_type_check

from nnsight.tracing.tracer import WithBlockNotFoundError

from mm_adapters._errors import InputError
from mm_adapters.inputs.call_names import RAW
from mm_adapters.nnsight_engine.adapters import AdaptedModel
from mm_adapters.nnsight_engine.call_arguments import REMOTE_OPTIONS
from mm_adapters.nnsight_engine.iteration import SiteTracer
from mm_adapters.nnsight_engine.pipe_inputs import Pipe
from mm_adapters.nnsight_engine.pipeline_module import PipelineModule
from mm_adapters.nnsight_engine.ready_module import PARTS
from mm_adapters.nnsight_engine.tasks import TASKS

# What a pipeline of transformers runs on, where it is given by name.
_INPUTS = (*RAW, "image", "inputs", "text_inputs", "input_features", "pixel_values")


class PipeTracer(SiteTracer):
    """A tracer whose invokes are a pipeline's inputs, as they are."""

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        """As nnsight's."""
        return super().invoke(pipe=(args, kwargs)) if args or kwargs else super().invoke()


class PipedModel(AdaptedModel):
    """A mixin for an nnsight model that transformers' pipeline for its task can be put around."""

    interleaver: Any
    trace: Any
    interleave: Any
    turn: Any
    running: Any
    processor: Any
    tokenizer: Any
    image_processor: Any
    _pipeline: Any = None
    _task: str | None = None

    @property
    def task(self) -> str | None:
        """What transformers calls the task of this model, where it has a name for it."""
        alone = [tower.role for tower in self.towers.values()] if self.kind == "tower" else []
        return self._task or TASKS.get(self.kind) or ("text-generation" if alone == ["language"] else None)

    @property
    def pipeline(self) -> Any:
        """diffusers' pipeline, or transformers' own for `task` around this model.

        Raises: InputError if there is no task.
        """
        if isinstance(self._module, PipelineModule):
            return self._module.pipeline
        if self.task is None:
            raise InputError(
                f"What is a {type(self._module).__name__} to do? Say it: TracedModel(..., task=...)."
            )
        if self._pipeline is None or self._pipeline.model is not self._module:
            from transformers import pipeline

            parts = {k: v for k in PARTS if (v := getattr(self, k)) is not None}
            if "processor" in parts:
                parts = {"processor": parts["processor"]}
            make: Any = pipeline
            self._pipeline = make(self.task, model=self._module, **parts)
        return self._pipeline

    @no_type_check  # As `TracedModel.generate`.
    def pipe(self, *inputs: Any, **kwargs: Any) -> Any:
        """`with model.pipe(...):` traces transformers' whole pipeline for `task`; the result is what it
        makes of the model's output (texts, labels). Called without `with` it runs it.

        Texts in a list, or one in each `tracer.invoke(...)`, are one batch: given no input, `pipe` takes the
        options of all of them.
        """
        job = {k: kwargs.pop(k) for k in REMOTE_OPTIONS if k in kwargs}
        call = {"pipe": (inputs, kwargs)}
        if self.interleaver.interleaving:
            return self._piped(**call)
        has_input = inputs or any(kwargs.get(name) is not None for name in _INPUTS)
        traced = call if has_input else {"pipe_options": kwargs}
        tracer = self.trace(fn=self._piped, tracer_cls=PipeTracer, **traced, **job)
        try:
            tracer.capture()
        except WithBlockNotFoundError:
            if job.get("remote"):
                raise InputError(
                    "A pipe goes remote as a block: with model.pipe(..., remote=...) as tracer:"
                ) from None
            with self.turn(), self.running():
                return self.interleave(self._piped, **call)
        return tracer

    def _piped(self, pipe: Pipe, pipe_options: dict[str, Any] | None = None) -> Any:
        inputs, kwargs = pipe
        return self.pipeline(*inputs, **kwargs, **(pipe_options or {}))
