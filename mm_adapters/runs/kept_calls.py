"""The calls of a sampling loop, kept: a run that was killed is run again, and does not compute them anew.

The loop itself runs from its start, so that its sampler, its noise and its callbacks are where they were. A
call of the denoiser that is kept is not computed: it gives what it gave, and the reads get what they got.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mm_adapters.hooks.wiring import Points
from mm_adapters.runs.joining import Value
from mm_adapters.runs.lens import Call, Read
from mm_adapters.runs.meter import Meter, with_call
from mm_adapters.runs.seen import Seen

Facts = Mapping[str, str]


class CallMemory(Protocol):
    """Where calls are kept, by name."""

    def next_run(self) -> str:
        """A name for the run that begins; the same one after a kill."""
        ...

    def key(self, given: Any) -> str:
        """A hash of what a call was given."""
        ...

    def get(self, name: str) -> tuple[dict[str, Tensor], Facts] | None:
        """What is kept under this name, on the CPU."""
        ...

    def put(self, name: str, tensors: Mapping[str, Tensor], facts: Facts) -> None:
        """Keeps it."""
        ...


@runtime_checkable
class Gathers(Protocol):
    """A reduce that keeps what it has gathered to itself, in two steps: the second is done again for a call
    that is not computed anew."""

    def part(self, value: Tensor, call: Call) -> Tensor:
        """What a value adds."""
        ...

    def add(self, part: Tensor, call: Call) -> Tensor:
        """Adds it; what the reduce returns."""
        ...


@contextmanager
def remembering(points: Points, memory: CallMemory) -> Iterator[None]:
    """A model's runs inside keep the calls of their loops in `memory`, and take those that are there from it.

    The functions of the reads and edits go by their value and its call alone, or are `Gathers`. Not kept are
    calls of runs with gradients, of a denoiser that goes by earlier calls (a cache), or that takes or gives
    what is neither tensors nor plain values: such runs compute everything.
    """
    before, points.call_memory = points.call_memory, memory
    try:
        yield
    finally:
        points.call_memory = before


class KeptCalls:
    """One run's: what its reads got in each call of its loops, and what its edits did.

    Args:
        read: The run's reads.
        values: What each of them got so far.
        seen: At which calls each of them fired.
        meters: The run's edits.
        edits_seen: At which calls and positions each of them fired.
    """

    def __init__(
        self,
        read: Sequence[Read],
        values: list[list[Value]],
        seen: Sequence[Seen],
        meters: Sequence[Meter],
        edits_seen: Sequence[Seen],
    ) -> None:
        self._read, self._values, self._seen = read, values, seen
        self._meters, self._edits_seen = meters, edits_seen
        self._gathered: list[tuple[int, Tensor, Call]] = []
        self._is_active = False

    def fold(self, index: int) -> Callable[[Tensor, Call], Any]:
        """The reduce of one read, as a function of a value and its call."""
        reduce = self._read[index].reduce
        assert reduce is not None
        plain = with_call(reduce)
        if not isinstance(reduce, Gathers):
            return plain

        def gather(value: Tensor, call: Call) -> Tensor:
            if not self._is_active:
                return plain(value, call)
            part = _afresh(reduce.part(value, call))
            self._gathered.append((index, part.clone(), call))
            return reduce.add(part, call)

        return gather

    @contextmanager
    def of(
        self, memory: CallMemory | None, loops: Iterable[str], called: Callable[[str], nn.Module]
    ) -> Iterator[None]:
        """The run belongs inside; its loops call these towers, and `called` gives the module of one."""
        if memory is None:
            yield
            return
        run, modules = memory.next_run(), {name: called(name) for name in loops}
        kept = {name: module for name, module in modules.items() if not _has_state(module)}
        own = {name: vars(module).get("forward") for name, module in kept.items()}
        self._is_active = True
        try:
            for name, module in kept.items():
                module.forward = self._keeping(module.forward, memory, f"{run}/{name}")
            yield
        finally:
            self._is_active = False
            for name, module in kept.items():
                before = own[name]
                if before is None:
                    vars(module).pop("forward", None)
                else:
                    module.forward = before

    def _keeping(self, forward: Callable[..., Any], memory: CallMemory, name: str) -> Callable[..., Any]:
        asked = [[r.site, r.steps, r.calls, str(r.rows), isinstance(r.reduce, Gathers)] for r in self._read]
        edits = [[e.site, e.steps, e.calls, str(e.rows), e.positions] for e in (m.edit for m in self._meters)]
        n_calls = 0

        @functools.wraps(forward)
        def keeping(*args: Any, **kwargs: Any) -> Any:
            nonlocal n_calls
            number, n_calls = n_calls, n_calls + 1
            if not _is_plain([args, kwargs]):
                return forward(*args, **kwargs)
            key = memory.key([asked, edits, args, kwargs])
            stored = memory.get(f"{name}/{number}")
            if stored is not None and stored[1].get("key") == key:
                device = next((t.device for t in _tensors([args, kwargs])), torch.device("cpu"))
                return self._again(*stored, device)
            n_before = [len(values) for values in self._values]
            self._gathered.clear()
            output = forward(*args, **kwargs)
            if not isinstance(output, Tensor | tuple) or not _is_plain(output):
                return output
            tensors, facts = self._since(n_before)
            output = _map(_afresh, output)
            parts = output if isinstance(output, tuple) else (output,)
            if not all(isinstance(part, Tensor) for part in parts):
                return output
            tensors |= {f"output {i}": part for i, part in enumerate(parts)}
            facts |= {"key": key, "output": "tuple" if isinstance(output, tuple) else "tensor"}
            memory.put(f"{name}/{number}", tensors, facts)
            return output

        return keeping

    def _since(self, n_before: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What the reads got since they had so many values; it lies in memory as it will when it is read."""
        tensors: dict[str, Tensor] = {}
        noted: list[list[Any]] = []
        for index, (values, n) in enumerate(zip(self._values, n_before, strict=True)):
            for i in range(n, len(values)):
                value = values[i]
                values[i] = Value(_afresh(value.tensor), value.call, value.part, value.n_before)
                tensors[f"value {len(noted)}"] = values[i].tensor
                noted.append([index, *value.call, value.part, value.n_before, value.tensor.is_cpu])
        gathered = [[index, *call, part.is_cpu] for index, part, call in self._gathered]
        tensors |= {f"gathered {i}": part for i, (_, part, _) in enumerate(self._gathered)}
        tensors |= {f"edit {i}": meter.state() for i, meter in enumerate(self._meters)}
        facts = {"values": noted, "gathered": gathered, "edits": [seen.state() for seen in self._edits_seen]}
        return tensors, {name: json.dumps(value) for name, value in facts.items()}

    def _again(self, tensors: Mapping[str, Tensor], facts: Facts, device: torch.device) -> Any:
        for i, (index, step, order, is_cpu) in enumerate(json.loads(facts["gathered"])):
            reduce = self._read[index].reduce
            assert isinstance(reduce, Gathers)
            reduce.add(_placed(tensors[f"gathered {i}"], device, is_cpu), Call(step, order))
        for i, (index, step, order, part, before, is_cpu) in enumerate(json.loads(facts["values"])):
            call = Call(step, order)
            value = _placed(tensors[f"value {i}"], device, is_cpu)
            self._values[index].append(Value(value, call, part, before))
            self._seen[index].note(call)
        for i, state in enumerate(json.loads(facts["edits"])):
            self._meters[i].restore(tensors[f"edit {i}"])
            self._edits_seen[i].restore(state)
        n = sum(name.startswith("output ") for name in tensors)
        parts = tuple(_placed(tensors[f"output {i}"], device, False) for i in range(n))
        return parts if facts["output"] == "tuple" else parts[0]


def _has_state(module: nn.Module) -> bool:
    """Whether a hook of diffusers is at work in it, as its caches are, which go by earlier calls."""
    registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return any(registry is not None and registry.hooks for registry in registries)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    plain = Tensor | bool | int | float | str | torch.dtype | torch.device
    return value is None or isinstance(value, plain)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _map(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_map(fn, part) for part in value)
    return fn(value) if isinstance(value, Tensor) else value


def _afresh(tensor: Tensor) -> Tensor:
    """A copy that lies in memory as one that was read from a file."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _placed(tensor: Tensor, device: torch.device, on_cpu: bool) -> Tensor:
    return _afresh(tensor) if on_cpu or device.type == "cpu" else tensor.to(device)
