"""pyvene's IntervenableModel, which leaves other people's hooks and the model's weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyvene as pv
from torch import nn

from integrations.pyvene._files import read, write
from integrations.pyvene._pipeline import PipelineHost, host
from integrations.pyvene.registration import register


class MMIntervenableModel(pv.IntervenableModel):
    """pyvene's IntervenableModel that takes off its own hooks and no others'.

    pyvene 0.1.8 removes every forward hook of every submodule at the start and end of each call
    (modeling_utils.remove_forward_hooks); transformers 5 captures hidden states with such hooks, so
    that a LLaVA would be broken for good, and a user's hooks are gone.
    """

    def __init__(self, config: Any, model: Any, **kwargs: Any) -> None:
        register(model)
        self._own: list[Any] = []
        super().__init__(config, host(model), **kwargs)

    def disable_model_gradients(self) -> None:
        """The model's weights take no gradient during a call; they are not frozen for good."""
        self.model_has_grad = False

    def _remove_forward_hooks(self) -> None:
        """Takes off what an interrupted call of ours left, and nothing else."""
        for handlers in self._own:
            handlers.remove()
        self._own.clear()

    def _intervention_getter(self, *args: Any, **kwargs: Any) -> Any:
        handlers = super()._intervention_getter(*args, **kwargs)
        self._own.append(handlers)
        return handlers

    def _intervention_setter(self, *args: Any, **kwargs: Any) -> Any:
        handlers = super()._intervention_setter(*args, **kwargs)
        self._own.append(handlers)
        return handlers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As pyvene's; an interrupted call leaves no hook behind."""
        try:
            with nullcontext() if self.model_has_grad else frozen(self.model):
                return super().forward(*args, **kwargs)
        finally:
            self._remove_forward_hooks()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As pyvene's; of a pipeline the whole sampling loop, whose inputs may be lists of prompts."""
        if args and isinstance(args[0], Mapping):
            args = ({k: _Rows(v) if isinstance(v, list) else v for k, v in args[0].items()}, *args[1:])
        if isinstance(self.model, PipelineHost):
            # Else pyvene passes by the first step, and takes no location for the location 0.
            kwargs.setdefault("intervene_on_prompt", True)
        try:
            with nullcontext() if self.model_has_grad else frozen(self.model):
                return super().generate(*args, **kwargs)
        finally:
            self._remove_forward_hooks()

    def _output_validation(self) -> None:
        # A sampling loop calls each getter and setter once a step.
        if not isinstance(self.model, PipelineHost):
            super()._output_validation()

    def save(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Writes the interventions as safetensors and JSON: their class, place, options and weights."""
        write(self, Path(save_directory))

    @staticmethod
    def load(load_directory: str | Path, model: Any, *args: Any, **kwargs: Any) -> MMIntervenableModel:
        """What `save` wrote, on a model of the same family.

        Raises: CheckpointError if the folder has none, or an intervention of no known class.
        """
        return MMIntervenableModel(read(Path(load_directory)), model)


class _Rows(list):
    """A list that says how many rows it has as a tensor does: pyvene asks its first input."""

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model's weights take no gradient inside, and are as they were afterwards."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)
