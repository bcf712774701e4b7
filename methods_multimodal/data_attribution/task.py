"""What is attributed: a measurement of each example, and the parameters it is differentiated by.

Every step downstream (gradients, stores, scorers, retraining) knows a model by its `Task` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from methods_multimodal.data_attribution._parameters import select
from mm_adapters import InputError

Batch = Mapping[str, Tensor]
Call = Callable[..., Any]
Values = Callable[[Call, Batch], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Task:
    """Measurements of examples, each a mean over draws (timesteps, noise), of one module.

    A batch is a mapping of tensors with the example first; "index" [example] says which examples
    they are, so that draws of noise belong to the example and not to its place in the batch.
    `rows(batch, draws)` lays a batch out as rows, example-major: [example * draw, ...].
    `values(call, rows)` gives each measure of each row, [row], calling the module through `call`;
    no row may depend on another. `about` says in JSON's types what the numbers depend on.
    """

    module: nn.Module
    parameters: tuple[str, ...]
    measures: tuple[str, ...]
    n_draws: int
    rows: Callable[[Batch, range], Batch]
    values: Values
    about: Mapping[str, Any] = field(default_factory=dict)

    def weights(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The differentiated parameters by name, detached: the module's own, or those of a checkpoint.

        Raises: InputError if the checkpoint lacks one or has it in another shape.
        """
        parameters = dict(self.module.named_parameters())
        state = parameters if state is None else state
        missing = [n for n in self.parameters if n not in state or state[n].shape != parameters[n].shape]
        if missing:
            raise InputError(
                f"The checkpoint does not fit: {', '.join(missing[:3])} missing or of another shape "
                f"({len(missing)} of {len(self.parameters)} parameters)."
            )
        return {n: state[n].detach().to(parameters[n]) for n in self.parameters}

    def constants(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Everything else the module computes with: other parameters, and buffers, detached."""
        tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        chosen, state = set(self.parameters), state or {}
        return {n: state.get(n, v).detach().to(v) for n, v in tensors.items() if n not in chosen}

    def call(self, weights: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Call:
        """The module as a function, computing with these tensors in place of its own."""
        return lambda *args, **kwargs: functional_call(self.module, {**constants, **weights}, args, kwargs)

    def per_example(
        self, batch: Batch, state: Mapping[str, Tensor] | None = None, *, max_rows: int = 256
    ) -> dict[str, Float[Tensor, " example"]]:
        """Each measure of each example, averaged over the draws; with a checkpoint's weights if given.

        At most `max_rows` rows run at once. Gradients flow if they are enabled and `state` has them.
        """
        n = len(batch["index"])
        call = self.module if state is None else self._with(state)
        step = max(1, max_rows // max(n, 1))
        sums: dict[str, Tensor] = {}
        for start in range(0, self.n_draws, step):
            draws = range(start, min(start + step, self.n_draws))
            measured = self.values(call, self.rows(batch, draws))
            for name in self.measures:
                part = measured[name].unflatten(0, (n, len(draws))).sum(1)
                sums[name] = sums[name] + part if name in sums else part
        return {name: total / self.n_draws for name, total in sums.items()}

    def _with(self, state: Mapping[str, Tensor]) -> Call:
        return lambda *args, **kwargs: functional_call(self.module, dict(state), args, kwargs)


def module_task(
    module: nn.Module,
    measures: Mapping[str, Callable[[Call, Batch], Float[Tensor, " example"]]],
    parameters: str | Sequence[str] = "all",
) -> Task:
    """A task of any module: each measure is `fn(call, batch) -> [example]`, without draws.

        module_task(net, {"loss": lambda call, b: F.cross_entropy(call(b["x"]), b["y"], reduction="none")})

    Raises: InputError for a parameter that is not there, or no measure.
    """
    if not measures:
        raise InputError("A task needs a measure: a name and a function of (call, batch).")

    def values(call: Call, rows: Batch) -> dict[str, Tensor]:
        return {name: fn(call, rows) for name, fn in measures.items()}

    names = select(module, parameters)
    about = {"module": type(module).__name__, "measures": list(measures), "n_draws": 1}
    return Task(module, names, tuple(measures), 1, lambda batch, _: batch, values, about)


Examples = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]


def batch_of(examples: Examples, start: int, stop: int) -> dict[str, Tensor]:
    """Examples `start` to `stop`, with their numbers as "index" if they bring none.

    Examples are one mapping of tensors, or a sequence (a torch Dataset) of one mapping each, which is
    read only where it is asked.
    """
    stop = min(stop, n_examples(examples))
    if isinstance(examples, Mapping):
        batch = {name: value[start:stop] for name, value in examples.items()}
    else:
        parts = [examples[i] for i in range(start, stop)]
        batch = {name: torch.stack([torch.as_tensor(p[name]) for p in parts]) for name in parts[0]}
    batch.setdefault("index", torch.arange(start, stop))
    return batch


def n_examples(examples: Examples) -> int:
    """How many examples there are. Raises: InputError if there are none, or the tensors disagree."""
    if not isinstance(examples, Mapping):
        if len(examples) == 0:
            raise InputError("There are no examples.")
        return len(examples)
    lengths = {name: len(value) for name, value in examples.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise InputError(f"Examples are tensors of one length, at least 1; these have {lengths}.")
    return next(iter(lengths.values()))
