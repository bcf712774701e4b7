"""A model made of a name, as nnsight's users make theirs: weights on demand, what prepares inputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nnsight.modeling.transformers import Generator, GeneratorEnvoy
from torch import nn

from mm_adapters.checkpoints.fill_weights import load_weights_into
from mm_adapters.checkpoints.open import OpenedCheckpoint, open_checkpoint
from mm_adapters.inputs.padding import is_encoder_decoder
from mm_adapters.inputs.prepare import Inputs
from mm_adapters.nnsight_engine.adapters import attach
from mm_adapters.nnsight_engine.pipeline_module import PipelineModule
from mm_adapters.nnsight_engine.pipes import PipedModel
from mm_adapters.nnsight_engine.ready_module import PARTS
from mm_adapters.nnsight_engine.tokenizer_settings import pad_as_nnsight


@dataclass
class Unread:
    """A checkpoint whose weights are not read yet; a model and its edited copies share one.

    They go into the modules that are here, unless the library itself `places` or packs them: then what it
    makes, `model`, takes their place.
    """

    read: Callable[[], OpenedCheckpoint]
    places: bool
    is_done: bool = False
    model: Any = None


def open_named(
    name: str | os.PathLike[str],
    *,
    dispatch: bool = False,
    device: Any = None,
    dtype: Any = None,
    **options: Any,
) -> tuple[OpenedCheckpoint, Unread | None]:
    """A checkpoint as `load` finds it, and what is left to read of it.

    Without `dispatch` its model is on the meta device. `options` may hold a processor, tokenizer or image
    processor to take instead of the checkpoint's.

    Raises: as `load`.
    """
    dtype = options.pop("torch_dtype", dtype)  # Its old name, which nnsight takes too.
    dtype = None if dtype == "auto" else dtype
    parts = {k: options.pop(k) for k in PARTS if options.get(k) is not None}

    def read(without_weights: bool = False) -> OpenedCheckpoint:
        return open_checkpoint(os.fspath(name), device, dtype, options, without_weights, **parts)

    is_lazy = not dispatch and str(device) != "meta"
    opened = read(without_weights=is_lazy)
    if opened.inputs.kind != "diffusion":
        pad_as_nnsight(opened.inputs.tokenizer, opened.model, opened.sites)
    places = any(options.get(option) is not None for option in ("device_map", "quantization_config"))
    return opened, Unread(read, places) if is_lazy else None


class NamedModel(PipedModel):
    """A mixin for an nnsight model that may be made of a name: weights on demand, and what prepares inputs.

    Its weights are read when it first runs, or by `dispatch()`; scans and remote runs need none.
    """

    path: str
    stand_for: Callable[[Any], None]
    _module: nn.Module
    generator: GeneratorEnvoy | None = None
    _unread: Unread | None = None

    @property
    def dispatched(self) -> bool:  # type: ignore[override]
        """Whether the weights are read."""
        return self._unread is None or self._unread.is_done

    @dispatched.setter
    def dispatched(self, value: bool) -> None:
        """Does nothing: nnsight sets it as it builds a model; here it follows from what is left to read."""

    def dispatch(self) -> None:
        """Reads the weights into the model's modules, if they are not read.

        With `device_map` or `quantization_config` the modules are others then, which the library made.
        Raises: CheckpointError if they cannot be read.
        """
        unread = self._unread
        if unread is None:
            return
        if not unread.is_done:
            model, inputs, *_ = unread.read()
            self._inputs = _with_parts(inputs, self._inputs)
            if self.peft is not None:
                attach(model, self.peft, weights=True)
            if unread.places:
                unread.model = model
            elif isinstance(self._module, PipelineModule):
                self._module.take(model)
            else:
                load_weights_into(self._module, model)
            unread.is_done = True
        if unread.model is not None and unread.model is not self.wrapped:
            self.stand_for(unread.model)

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

    def _is_causal(self) -> bool:
        """nnsight's own word: whether this is a decoder that generates, and no encoder comes before it."""
        can_generate = getattr(self._module, "can_generate", bool)()
        return can_generate and not is_encoder_decoder(self._module)


def _with_parts(new: Inputs, old: Inputs | None) -> Inputs:
    """What prepares inputs, with the tokenizer and processors that a model had before, and their settings."""
    if old is None or old.kind == "diffusion":
        return new
    return replace(new, **{part: getattr(old, part) for part in PARTS})


def generator_of(model: NamedModel) -> GeneratorEnvoy | None:
    """The envoy that a generation's tokens pass, as nnsight's; None for a model that does not generate.

    `model.generator.streamer.output` is, at each step of a loop, the step's input: the prompt, then the
    token that the step before generated.
    """
    if not getattr(model._module, "can_generate", bool)():
        return None
    return GeneratorEnvoy(Generator(), f"{model.path}.generator", interleaver=model.interleaver, parent=model)  # type: ignore[arg-type]


def generated(model: NamedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The wrapped model's generation, its tokens passed through `model.generator`."""
    call: Any = model._module.generate
    if model.generator is None:
        return call(*args, **kwargs)
    config = kwargs.get("generation_config") or getattr(model._module, "generation_config", None)
    if (kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1) == 1:  # Beams take no streamer.
        kwargs.setdefault("streamer", model.generator.streamer._module)
    return model.generator(call(*args, **kwargs), hook=True)
