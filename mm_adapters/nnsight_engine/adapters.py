"""PEFT's adapters on a traced model, put into its modules and taken out again, as nnsight's users do.

An adapter's layers stand in the places of those that it changes, so sites and paths stay where they were,
and hold what the adapted model computes. nnsight 0.8.1 (modeling/peft.py) puts them in; here they are in
eval mode as the model is, the weights beside them can be trained or not as before, and only safetensors are
read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nnsight.modeling import peft as nnsight_peft
from torch import nn

from mm_adapters._errors import CheckpointError, InputError
from mm_adapters.checkpoints.source import Source
from mm_adapters.nnsight_engine.pipeline_module import PipelineModule
from mm_adapters.runs.base_model import BaseModel

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass
class Attached:
    """The adapter in a model's modules; a model and its edited copies share one."""

    name: str | None = None


class AdaptedModel(BaseModel):
    """A mixin for an nnsight model that may have an adapter: `peft` is its name, None without one."""

    _module: nn.Module
    _attached: Attached
    _wire_again: Callable[[nn.Module], None]
    dispatched: bool

    @property
    def peft(self) -> str | None:
        """The adapter that is in the model, by the name it was loaded as."""
        return self._attached.name

    def load_adapter(self, peft_id: str | os.PathLike[str] | None) -> None:
        """Puts an adapter of PEFT into the model, in place of the one there; None takes that one out.

        `peft_id` is a folder that `save_pretrained` wrote, or an id on the hub. Sites and paths stay. On a
        model whose weights are not read yet the adapter's come with them. With `remote=` a job names it, and
        the service's model has it for the job.

        Raises: InputError for an adapter that adds no layers (a learned prompt) or whose weights have no
        place in this model, and for a pipeline; CheckpointError if it cannot be read; ImportError without
        peft.
        """
        name = None if peft_id is None else os.fspath(peft_id)
        if name == self.peft:
            return
        with self.turn():
            if name is not None:
                check_adapter(name, self._module, is_ours=self.peft is not None)
            if self.peft is not None:
                nnsight_peft.detach(self._module)
                self._attached.name = None
            try:
                if name is not None:
                    attach(self._module, name, weights=self.dispatched)
                    self._attached.name = name
            finally:
                self._wire_again(self._module)


def check_adapter(name: str, module: nn.Module, *, is_ours: bool) -> None:
    """Passes if an adapter is there, with weights that may be read, and a module has none but `is_ours`.

    Raises: as `load_adapter`.
    """
    nnsight_peft.import_peft()
    if not is_ours and getattr(module, "peft_config", None) is not None:
        raise InputError(
            "This model came with an adapter of PEFT in it, which load_adapter cannot take out. Give the "
            "model without it (PeftModel.unload(), merge_and_unload()), or switch it there."
        )
    if isinstance(module, PipelineModule):
        raise InputError(
            "peft= is for a model of transformers. A pipeline has its own way: "
            "model.wrapped.load_lora_weights(...)."
        )
    folder = Path(name).expanduser()
    source = Source(str(folder), folder) if folder.is_dir() else Source.at_hub(name, {})
    for file in (_CONFIG, _WEIGHTS):
        try:
            is_there = source.file(file) is not None
        except CheckpointError as error:
            raise CheckpointError(f"There is no adapter {name!r}: no such folder, and {error}.") from None
        if not is_there:
            raise CheckpointError(
                f"The adapter {name!r} has no {file}. Pass the folder, or the id on the hub, that "
                "save_pretrained of a PeftModel wrote; weights are read from safetensors only."
            )


def attach(module: nn.Module, name: str, *, weights: bool) -> None:
    """Puts an adapter into a module's layers; without `weights` its layers only.

    Raises: InputError if it adds no layers, or its weights have no place there.
    """
    trained = {id(p): p.requires_grad for p in module.parameters()}
    try:
        nnsight_peft.attach(module, name, weights=weights)
    except ValueError as error:
        raise InputError(str(error)) from None
    finally:
        # PEFT freezes what was there, and its layers are made in training mode, where dropout draws.
        for p in module.parameters():
            p.requires_grad_(trained.get(id(p), any(trained.values())))
        module.train(module.training)
