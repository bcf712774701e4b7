"""A model that is named and not given, as nnsight's users do it: weights on demand, processor, pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, no_type_check

from nnsight.intervention.envoy import Envoy
from nnsight.modeling.transformers import Generator
from nnsight.tracing.tracer import WithBlockNotFoundError

from mm_adapters._errors import InputError
from mm_adapters.checkpoints.fill_weights import load_weights_into
from mm_adapters.ndif_client.remotable import ServedModel
from mm_adapters.nnsight_engine.call_arguments import REMOTE_OPTIONS
from mm_adapters.nnsight_engine.pipeline_module import PipelineModule
from mm_adapters.nnsight_engine.tasks import TASKS

if TYPE_CHECKING:
    from mm_adapters.checkpoints.origin import CheckpointRef
    from mm_adapters.inputs.prepare import Inputs

PARTS = ("processor", "tokenizer", "image_processor")


@dataclass
class Unread:
    """A checkpoint whose weights are not here yet; a model and its edited copies share one."""

    read: Callable[[], tuple[Any, Inputs]]
    is_done: bool = False


@dataclass(frozen=True)
class Opened:
    """What a name stands for: a model (on the meta device if `unread`), its inputs, and where it is from."""

    model: Any
    inputs: Inputs
    origin: CheckpointRef | None
    unread: Unread | None


def open_named(
    name: str | os.PathLike[str],
    *,
    dispatch: bool = False,
    device: Any = None,
    dtype: Any = None,
    **options: Any,
) -> Opened:
    """A checkpoint as `load` finds it; without `dispatch` its weights stay where they are.

    `options` may hold a processor, tokenizer or image processor to take instead of the checkpoint's.
    """
    from mm_adapters.checkpoints.open import open_checkpoint

    parts = {k: options.pop(k) for k in PARTS if options.get(k) is not None}
    device_wanted = device if dispatch else "meta"
    model, inputs, origin, _ = open_checkpoint(os.fspath(name), device_wanted, dtype, options, **parts)

    def read() -> tuple[Any, Inputs]:
        return open_checkpoint(os.fspath(name), device, dtype, options, **parts)[:2]

    return Opened(model, inputs, origin, None if dispatch or str(device) == "meta" else Unread(read))


class NamedModel(ServedModel):
    """A model that can be made of a name, and that has what nnsight's users look for on one.

    Its weights are read when it first runs, or by `dispatch()`; scans and remote runs need none.
    """

    generator: Envoy | None = None
    _inputs: Inputs | None
    _unread: Unread | None = None
    _task: str | None = None

    @property
    def kind(self) -> str:
        """ "contrastive", "vlm", "diffusion" or "tower"."""
        raise NotImplementedError

    @property
    def dispatched(self) -> bool:
        """Whether the weights are here."""
        return self._unread is None or self._unread.is_done

    @dispatched.setter
    def dispatched(self, value: bool) -> None:
        """nnsight sets it as it builds a model; here it follows from what is left to read."""

    def dispatch(self) -> None:
        """Reads the weights, if they are not here, into the modules that are.

        Raises: CheckpointError if they cannot be read.
        """
        if self._unread is None or self._unread.is_done:
            return
        model, self._inputs = self._unread.read()
        if isinstance(self._module, PipelineModule):
            self._module.take(model)
        else:
            load_weights_into(self._module, model)
        self._unread.is_done = True

    @property
    def task(self) -> str | None:
        """What transformers calls the task of this model, where it has a name for it."""
        return self._task or TASKS.get(self.kind)

    @property
    def processor(self) -> Any:
        """What prepares texts with images, or None."""
        return getattr(self._inputs, "processor", None)

    @property
    def tokenizer(self) -> Any:
        """What prepares texts, or None."""
        return getattr(self._inputs, "tokenizer", None)

    @property
    def image_processor(self) -> Any:
        """What prepares images, or None."""
        return getattr(self._inputs, "image_processor", None)

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
        if "_pipeline" not in self.__dict__:
            from transformers import pipeline

            parts = {k: v for k in PARTS if (v := getattr(self, k)) is not None}
            if "processor" in parts:
                parts = {"processor": parts["processor"]}
            made: Any = pipeline
            self.__dict__["_pipeline"] = made(self.task, model=self._module, **parts)
        return self.__dict__["_pipeline"]

    @no_type_check  # As `TracedModel.generate`.
    def pipe(self, *inputs: Any, **kwargs: Any) -> Any:
        """`with model.pipe(...):` traces transformers' whole pipeline for `task`; the result is what it
        makes of the model's output (texts, labels). Called without `with` it runs it.
        """
        job = {k: kwargs.pop(k) for k in REMOTE_OPTIONS if k in kwargs}
        call = {"pipe": (inputs, kwargs)}
        if self.interleaver.interleaving:
            return self._piped(**call)
        tracer = self.trace(fn=self._piped, **call, **job)
        try:
            tracer.capture()
        except WithBlockNotFoundError:
            if job.get("remote"):
                raise ValueError(
                    "A pipe goes remote as a block: with model.pipe(..., remote=...) as tracer:"
                ) from None
            return self.interleave(self._piped, **call)
        return tracer

    def _piped(self, pipe: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        inputs, kwargs = pipe
        return self.pipeline(*inputs, **kwargs)


def generator_of(model: NamedModel) -> Envoy | None:
    """Where a generation's tokens pass, as nnsight's; None for a model that writes none.

    `model.generator.streamer.output` is, at each step of a loop, what the model was given: the prompt, then
    the token that the step before wrote.
    """
    if not getattr(model._module, "can_generate", bool)():
        return None
    return Envoy(Generator(), f"{model.path}.generator", interleaver=model.interleaver, parent=model)


def generated(model: NamedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the wrapped model generates, its tokens passed through `model.generator`."""
    call: Any = model._module.generate
    if model.generator is None:
        return call(*args, **kwargs)
    config = kwargs.get("generation_config") or getattr(model._module, "generation_config", None)
    if (kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1) == 1:  # Beams take no streamer.
        kwargs.setdefault("streamer", model.generator.streamer._module)
    return model.generator(call(*args, **kwargs), hook=True)
