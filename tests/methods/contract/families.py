"""The tiny families as the contract of methods sees them: both engines, and the models' own output."""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any, Literal, get_args

import tiny
import torch
from torch import Tensor, nn

import mm_adapters as mm
from tests.methods.contract import processors

Engine = Literal["hooked", "nnsight"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
TEXT_INPUTS = ("input_ids", "attention_mask", "text")
# Pipelines whose schedulers divide by their steps less one, or in which text adds little to the first step.
_TWO_STEPS = ("kandinsky_prior", "kandinsky_3", "kandinsky_combined", "unclip")


class Family:
    """One tiny family under both engines, each around a model of its own with the same weights."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._models: dict[str, Any] = {}
        self._outputs: dict[str, Tensor] = {}

    @cached_property
    def case(self) -> tiny.Case:
        """The model that the hooked engine runs, its inputs, and the part of its output that is looked at."""
        return tiny.CASES[self.name]()

    def model(self, engine: Engine) -> Any:
        """The family's model under one engine, with what prepares raw texts and images where we have one."""
        if engine not in self._models:
            case = self.case if engine == "hooked" else tiny.CASES[self.name]()
            parts = processors.of(self.name, mm.SiteMap(case.model), case)
            self._models[engine] = mm.wrap(case.model, engine=engine, **parts)
        return self._models[engine]

    @property
    def inputs(self) -> dict[str, Any]:
        """The model's own arguments; a pipeline's with as few steps as it takes."""
        steps = {k: self.n_steps for k in self.case.inputs if k.endswith("num_inference_steps")}
        return self.case.inputs | steps

    @property
    def n_steps(self) -> int:
        """The fewest steps that every method can be run with."""
        return 2 if self.name in _TWO_STEPS else 1

    def output(self, engine: Engine) -> Tensor:
        """What the wrapped model gives by its own call, with no engine in between."""
        inputs = dict(self.inputs)
        if "seed" in inputs:
            inputs["generator"] = torch.Generator().manual_seed(inputs.pop("seed"))
        with torch.no_grad():
            return self.case.head(self.model(engine).wrapped(**inputs))

    def output_before(self, engine: Engine) -> Tensor:
        """The same, as it was before any method ran."""
        if engine not in self._outputs:
            self._outputs[engine] = self.output(engine)
        return self._outputs[engine]

    def width(self, engine: Engine) -> int:
        """How wide the summary of the vision tower is; 1 if there is none."""
        model = self.model(engine)
        if "vision" not in model.towers or model.kind not in ("contrastive", "tower"):
            return 1
        if "width" not in self._outputs:
            pixels = {k: v for k, v in self.inputs.items() if k not in TEXT_INPUTS}
            self._outputs["width"] = model.towers["vision"].summary(model.run(pixels).output)
        return self._outputs["width"].shape[-1]


@cache
def family(name: str) -> Family:
    """The family of this name; built once, and its models when they are first asked for."""
    return Family(name)


def modules(model: Any) -> list[nn.Module]:
    """Every module of a module or pipeline."""
    roots = [model] if isinstance(model, nn.Module) else [
        m for m in model.components.values() if isinstance(m, nn.Module)]  # fmt: skip
    return [m for root in roots for m in root.modules()]


def count_hooks(model: Any) -> int:
    """How many hooks are on it, of every sort that torch has."""
    sorts = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, sort)) for m in modules(model) for sort in sorts)
