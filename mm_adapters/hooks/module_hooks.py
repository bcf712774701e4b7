"""Taps on an untouched model: a torch hook is there only while somebody listens.

A `ModuleHook` is one torch hook on one module; it hands the module's tensor to its readers in the order the
sites come in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from mm_adapters._errors import AttentionUnreachableError
from mm_adapters.hooks.attention import AttentionInterceptor, JointText
from mm_adapters.hooks.point import Point, tracked
from mm_adapters.hooks.readers import KeepInput, Reader, TextLength

Side = Literal["input", "output", "inside"]
Slot = int | str | None


class ModuleHook:
    """One torch hook on one module, present only while a point that it feeds is live.

    `packed`: the module's tensors have no batch axis; its readers are shown one row. `unfolds`: the
    tap of the block's input, whose batch and positions this module's tensors have in one axis. Each
    reader has a slot: which of the things that the module is given or returns is its own, a name or a
    number; None is the first tensor.
    """

    unfolds: ModuleHook | None = None
    block_input: Tensor | None = None

    def __init__(self, module: nn.Module, side: Side, packed: bool = False) -> None:
        self.module = module
        self.side = side
        self.packed = packed
        self.readers: list[Reader | KeepInput] = []
        self.slots: list[Slot] = []
        self._n_live = 0
        self._handles: list[Any] = []

    @property
    def live(self) -> bool:
        """Whether a point that it feeds is live."""
        return self._n_live > 0

    def add(self, reader: Reader | KeepInput, slot: Slot = None, *, first: bool = False) -> None:
        """Hands what is in a slot to one more reader, before the others if `first`."""
        at = 0 if first else len(self.readers)
        self.readers.insert(at, reader)
        self.slots.insert(at, slot)

    def count(self, change: int) -> None:
        """One more or one fewer live point: the hook goes on with the first and off with the last."""
        self._n_live += change
        if self._n_live and not self._handles:
            self._handles = self._attach()
        elif not self._n_live and self._handles:
            self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _attach(self) -> list[Any]:
        # First in line: the host library captures hidden states with hooks of its own.
        if self.side == "input":
            return [self.module.register_forward_pre_hook(self._given, with_kwargs=True, prepend=True)]
        return [self.module.register_forward_hook(self._returned, prepend=True)]

    def shown(self, value: Any, slot: Slot) -> Tensor:
        """What a reader is shown of the module's output, or of its args and kwargs."""
        if self.side == "output":
            at = _place_of(value, slot)
            return self._rows_apart(value if at is None else value[at])
        args, kwargs = value
        plain = slot is None and args and isinstance(args[0], Tensor)
        at = 0 if plain else self._argument(args, kwargs, slot)
        return self._rows_apart(args[at] if isinstance(at, int) else kwargs[at])

    def _given(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        new = args, kwargs
        for reader, slot in zip(self.readers, self.slots, strict=True):
            if reader.live:
                at = self._argument(*new, slot)
                x = new[0][at] if isinstance(at, int) else new[1][at]
                y = self._read(reader, x)
                if y is not x and isinstance(at, int):
                    new = (*new[0][:at], y, *new[0][at + 1 :]), new[1]
                elif y is not x:
                    new = new[0], {**new[1], at: y}
        return None if new[0] is args and new[1] is kwargs else new

    def _returned(self, module: nn.Module, args: tuple[Any, ...], output: Any):
        new = output
        for reader, slot in zip(self.readers, self.slots, strict=True):
            if reader.live:
                at = _place_of(new, slot)
                x = new if at is None else new[at]
                y = self._read(reader, x)
                if y is not x:
                    new = _with_tensor(new, at, y)
        return None if new is output else new

    def _argument(self, args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot) -> int | str:
        if not isinstance(slot, str):
            return _first_tensor(args, kwargs)
        if slot in kwargs:
            return slot
        names = list(inspect.signature(type(self.module).forward).parameters)
        return names.index(slot) - 1  # Less self.

    def _read(self, reader: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        shown = self._rows_apart(x)
        new = reader(shown)
        if new is shown and (shown is x or not tracked(new)):
            return x
        new = new if shown is x else new.reshape(x.shape)
        # Modelling code takes views of what its modules give.
        return new.contiguous() if x.is_contiguous() else new

    def _rows_apart(self, x: Tensor) -> Tensor:
        if self.unfolds is not None:
            assert self.block_input is not None
            return x.reshape(*self.block_input.shape[:2], -1)
        return x.unsqueeze(0) if self.packed else x


class AttentionHook(ModuleHook):
    """Inside one attention module: a `AttentionInterceptor` that stands there while a point listens."""

    def __init__(self, module: nn.Module, n_heads: int) -> None:
        super().__init__(module, "inside")
        self.n_heads = n_heads
        self.n_kv_heads = n_heads
        self.n_calls = 1
        self.points: dict[str, Point] = {}
        self.text: TextLength | None = None
        self.text_first = False
        self._watches: list[AttentionInterceptor] = []

    def _attach(self) -> list[Any]:
        return [
            self.module.register_forward_pre_hook(self._enter),
            self.module.register_forward_hook(self._leave, always_call=True, prepend=True),
        ]

    def _detach(self) -> None:
        super()._detach()
        self.unwind()

    def unwind(self) -> None:
        """Takes down what an interrupted forward left standing."""
        while self._watches:
            self._watches.pop().__exit__(None, None, None)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.unwind()
        watch = self.watch(self._fire, self._wants)
        self._watches.append(watch)
        watch.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._watches:
            return
        watch = self._watches.pop()
        watch.__exit__(None, None, None)
        if not watch.calls and output is not None:
            wanted = ", ".join(p.site.name for p in self.points.values() if p.live)
            raise AttentionUnreachableError(
                f"{wanted}: {type(module).__name__} attended with a kernel that cannot be watched. "
                'Load the model with attn_implementation="sdpa" or "eager" (transformers), or set '
                "its attention backend to native (diffusers)."
            )

    def watch(self, fire: Any, wants: Any) -> AttentionInterceptor:
        """What stands in this module while it attends."""
        n_text = self.text.n_text if self.text is not None else None
        joint = None if n_text is None else JointText(n_text, self.text_first)
        return AttentionInterceptor(fire, wants, self.n_heads, self.n_kv_heads, joint, self.n_calls)

    def _wants(self, name: str) -> bool:
        point = self.points.get(name)
        return point is not None and point.live

    def _fire(self, name: str, x: Tensor) -> Tensor:
        return self.points[name](x) if self._wants(name) else x


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return i
    for name in ("hidden_states", "inputs_embeds", "sample", *kwargs):
        if isinstance(kwargs.get(name), Tensor):
            return name
    raise TypeError("The module was called without a tensor, so there is nothing to read at its input.")


def _place_of(output: Any, slot: Slot) -> Any:
    """The key or number of what is meant in an output; None if the output is it."""
    if isinstance(output, Tensor):
        return None
    if slot is not None:
        return slot
    entries = enumerate(output) if isinstance(output, tuple | list) else output.items()
    return next(at for at, value in entries if isinstance(value, Tensor))


def _with_tensor(output: Any, at: Any, new: Tensor) -> Any:
    if at is None:
        return new
    if isinstance(output, tuple):
        return (*output[:at], new, *output[at + 1 :])
    output[at] = new
    return output
