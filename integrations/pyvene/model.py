"""pyvene's IntervenableModel, which leaves hooks of others and the model's weights alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyvene as pv
import torch
from torch import nn

from integrations.pyvene._files import read, read_weights, write, write_weights
from integrations.pyvene._members import MEMBERS
from integrations.pyvene._pipeline import ModelLike, PipelineHost, host
from integrations.pyvene.gates import StepGate, layers_of
from integrations.pyvene.interventions import refuse_subspaces
from integrations.pyvene.locations import alike, counted
from integrations.pyvene.options import check_options
from integrations.pyvene.registration import register
from mm_adapters import InputError, Schedule, SiteMap, UnknownFamilyError
from mm_adapters.records import is_guided

_OPTIONS = ("use_fast", "as_adaptor", "intervenables_sort_fn")


class MMIntervenableModel(pv.IntervenableModel):
    """pyvene's IntervenableModel that takes off its own hooks and no others'.

    pyvene 0.1.8 removes every forward hook of every submodule at the start and end of each call
    (modeling_utils.remove_forward_hooks); transformers 5 captures hidden states with such hooks, so
    that a LLaVA would be broken for good, and a user's hooks are gone.

    A location below 0 counts back from each row's last attended position: -1 is its last token, wherever
    the padding is. pyvene counts from 0 only.

    `model` is an `mm.Model`, or the module or pipeline that it wraps. A module that no family covers (GPT-2,
    an MLP, a GRU, ...) is pyvene's own: its components have pyvene's names, or are paths, and its weights are
    frozen as pyvene freezes them. `options` are pyvene's.

    Raises: InputError for an option that pyvene does not have, or a StepGate whose rows are no part of
    the loop's guidance.
    """

    def __init__(self, config: Any, model: ModelLike, **options: Any) -> None:
        check_options(type(self), options, _OPTIONS)
        self._sites = sites_of(model)
        if self._sites is not None:
            register(model)
        self._handlers: list[Any] = []
        self._arguments: Mapping[str, Any] = {}
        self._sources: Any = None
        super().__init__(config, host(model), **options)
        self._starts_fast = bool(options.get("use_fast"))
        loops = self._loops
        for key, intervention in self.interventions.items():
            site = str(self.representations[key].component)
            guidance = loops.get(site.partition(".")[0])
            for gate in _gates_in(intervention):
                gate.attach(site, guidance, partial(self._is_guided, guidance))

    @property
    def _loops(self) -> Mapping[str, Any]:
        return {} if self._sites is None else self._sites.loops

    def _is_guided(self, guidance: Any) -> bool:
        """Whether the run that goes on has unconditional parts."""
        pipeline = self.model.__dict__.get("pipeline")
        return guidance is not None and is_guided(pipeline, guidance, self._arguments)

    def disable_model_gradients(self) -> None:
        """The model's weights take no gradient during a call; they are not frozen for good.

        Those of a model that no family covers are, as in pyvene.
        """
        if self._sites is None:
            super().disable_model_gradients()
        self.model.eval()
        self.model_has_grad = False

    def _broadcast_unit_locations(self, batch_size: int, unit_locations: Any) -> Any:
        every = super()._broadcast_unit_locations(batch_size, unit_locations)
        if self._sites is None:
            if self.is_model_stateless:
                self.use_fast = self._starts_fast or alike(every)
            return every
        groups = {key: group for group, keys in self._intervention_group.items() for key in keys}
        sources = self._sources if isinstance(self._sources, list) else [self._sources]
        located = {}
        for name, pair in every.items():
            parts: list[Any] = [None if part is None else list(part) for part in pair]
            for i, key in enumerate(self.sorted_keys):
                # In turn, one source after the other, what is read and written has no one row.
                source = sources[groups[key] if len(sources) > 1 else 0] if name == "sources->base" else None
                base = self._arguments if name == "sources->base" else None
                for part, arguments in zip(parts, (source, base), strict=True):
                    if part is not None and i < len(part):
                        part[i] = counted(part[i], self.representations[key], self._sites, arguments)
            located[name] = tuple(parts)
        # It makes pyvene write at the first row's locations, and one number for all rows sets it for good.
        self.use_fast = alike(located)
        return located

    def _remove_forward_hooks(self) -> None:
        """Takes off the hooks that an interrupted call of this model left, and no others."""
        for handlers in self._handlers:
            handlers.remove()
        self._handlers = []

    def _intervention_getter(self, *args: Any, **kwargs: Any) -> Any:
        handlers = super()._intervention_getter(*args, **kwargs)
        self._handlers.append(handlers)
        return handlers

    def _intervention_setter(self, *args: Any, **kwargs: Any) -> Any:
        handlers = super()._intervention_setter(*args, **kwargs)
        self._handlers.append(handlers)
        return handlers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As pyvene's; an interrupted call leaves no hook behind.

        Raises: InputError for subspaces that an intervention does not use; EditNeverFiredError for a
        StepGate that did not act in each of its steps.
        """
        with self._call(_bound(super().forward, args, kwargs)):
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As pyvene's; of a pipeline the whole sampling loop, whose inputs may be lists of prompts.

        Raises: InputError and EditNeverFiredError as `forward` does.
        """
        if args and isinstance(args[0], Mapping):
            args = ({k: _Rows(v) if isinstance(v, list) else v for k, v in args[0].items()}, *args[1:])
        if isinstance(self.model, PipelineHost):
            if kwargs.get("intervene_on_prompt") is False:
                raise InputError("A pipeline has no pass over a prompt to leave out: use a StepGate.")
            # Else pyvene takes no location for the location 0.
            kwargs["intervene_on_prompt"] = True
        with self._call(_bound(super().generate, args, kwargs)):
            return super().generate(*args, **kwargs)

    @contextmanager
    def _call(self, call: inspect.BoundArguments) -> Iterator[None]:
        """One call: what it cannot honour is refused before it, and hooks are gone after it."""
        base, subspaces = call.arguments.get("base"), call.arguments.get("subspaces")
        self._arguments = base if isinstance(base, Mapping) else {}
        self._sources = call.arguments.get("sources")
        interventions = list(self.interventions.values())
        each = self._broadcast_subspaces(1, subspaces)
        for i, intervention in enumerate(interventions):
            *_, innermost = layers_of(intervention)
            refuse_subspaces(innermost, each[i] if isinstance(each, list) and i < len(each) else None)
        gates = [gate for intervention in interventions for gate in _gates_in(intervention)]
        try:
            with ExitStack() as stack:
                stack.enter_context(nullcontext() if self.model_has_grad else frozen(self.model))
                schedules = {loop: self._watched(loop, stack) for loop in self._loops if gates}
                for gate in gates:
                    gate.reset(schedules.get(gate.loop))
                yield
        finally:
            self._remove_forward_hooks()
        for gate in gates:
            gate.check_acted()

    def _watched(self, loop: str, stack: ExitStack) -> Schedule | None:
        pipeline = self.model.__dict__.get("pipeline")
        if pipeline is None or self._sites is None:
            return None
        schedule = Schedule.of(pipeline, self._sites.model_record, loop)
        if schedule is not None:
            stack.enter_context(schedule.watched())
        return schedule

    @property
    def _is_generation(self) -> bool:
        # While it is true, pyvene leaves out calls of a module: the prompt's, or those after it. A sampling
        # loop has no prompt's call.
        return self.__dict__.get("_generates", False) and not isinstance(self.model, PipelineHost)

    @_is_generation.setter
    def _is_generation(self, value: bool) -> None:
        self.__dict__["_generates"] = value

    def set_temperature(self, temp: torch.Tensor) -> None:
        """Sets the temperature of every intervention that has one, inside wrappers too."""
        for intervention in self.interventions.values():
            for layer in layers_of(intervention):
                if hasattr(layer, "set_temperature"):
                    layer.set_temperature(temp)

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of interventions that train, inside wrappers too; after `enable_model_gradients`
        the model's too."""
        return [p for _, p in self.named_parameters()]

    def named_parameters(self, recurse: bool = True) -> list[tuple[str, nn.Parameter]]:  # type: ignore[override]
        """Those of `get_trainable_parameters`, a list as in pyvene: "KEY.NAME", or "model.NAME"."""
        trained = [(f"{key}.{n}", p) for key, one in self._trained() for n, p in one.named_parameters()]
        return [*trained, *self._of_model().items()]

    def count_parameters(self, include_model: bool = False) -> int:
        """How many numbers train; those that linked interventions share count once."""
        counted = {id(p): p for _, one in self._trained() for p in one.parameters() if p.requires_grad}
        return sum(p.numel() for p in [*counted.values(), *self._of_model(include_model).values()])

    def set_zero_grad(self) -> None:
        """Clears the gradients of the interventions that train, inside wrappers too."""
        for _, one in self._trained():
            one.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `set_zero_grad`: the model's gradients stay, as in pyvene."""
        self.set_zero_grad()

    def train_alignment(self, *args: Any, **kwargs: Any) -> None:
        """Refused: pyvene's loop takes every hook off the model, whoever put it there. `align` trains.

        Raises: InputError.
        """
        raise InputError(
            f"train_alignment {MEMBERS['train_alignment']}. Train with integrations.pyvene.align, or in a "
            "loop of your own over get_trainable_parameters()."
        )

    def _trained(self) -> list[tuple[str, nn.Module]]:
        return [(k, one) for k, one in self.interventions.items() if getattr(one, "trainable", False)]

    def _takes_gradients(self, parameter: nn.Parameter) -> bool:
        """Of a model of our families no weight does in a call, unless the model's gradients are enabled."""
        return parameter.requires_grad and (self.model_has_grad or self._sites is None)

    def _output_validation(self) -> None:
        # A sampling loop calls each getter and setter once a step.
        if not isinstance(self.model, PipelineHost):
            super()._output_validation()

    def save(self, save_directory: str | Path, **options: Any) -> None:
        """Writes the interventions as safetensors and JSON: their class, site, options and weights.

        Raises: InputError for an intervention that cannot be saved, or one of pyvene's options (the hub,
        the model's own weights), which are not served.
        """
        check_options(type(self), options, ())
        write(self, Path(save_directory))

    @staticmethod
    def load(load_directory: str | Path, model: ModelLike, **options: Any) -> MMIntervenableModel:
        """What `save` wrote, on a model of the same family.

        Raises: CheckpointError if the folder has none, or an intervention of no known class; InputError
        for one of pyvene's options (the hub, the model's own weights), which are not served.
        """
        check_options(MMIntervenableModel, options, ())
        return MMIntervenableModel(read(Path(load_directory)), model)

    def save_intervention(self, save_directory: str | Path, include_model: bool = True) -> None:
        """Writes weights alone, as safetensors: of interventions that train, and of the model if it does."""
        write_weights(self._trained(), self._of_model(include_model), Path(save_directory))

    def load_intervention(self, load_directory: str | Path, include_model: bool = True) -> None:
        """Reads what `save_intervention` wrote into this object.

        Raises: CheckpointError if the folder has none, or weights of others; then nothing is changed.
        """
        read_weights(self._trained(), self._of_model(include_model), Path(load_directory))

    def _of_model(self, include: bool = True) -> dict[str, nn.Parameter]:
        """The weights of the model that train."""
        named = self.model.named_parameters()
        return {f"model.{name}": p for name, p in named if include and self._takes_gradients(p)}


def sites_of(model: ModelLike) -> SiteMap | None:
    """The sites of a model; None for a module that no family covers, which is pyvene's own business."""
    wrapped = getattr(model, "wrapped", model)
    try:
        return SiteMap(wrapped)
    except UnknownFamilyError:
        if not isinstance(wrapped, nn.Module):
            raise
        return None


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
        for p, requires_grad in before:
            p.requires_grad_(requires_grad)


def _bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The arguments by name. Raises: InputError if the function does not take them."""
    try:
        return inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"pyvene's {function.__name__}: {error}.") from None


def _gates_in(intervention: Any) -> list[StepGate]:
    return [layer for layer in layers_of(intervention) if isinstance(layer, StepGate)]
