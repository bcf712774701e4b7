"""Hooks on an untouched model: a torch hook is there only while a point that it feeds is live.

A `ModuleHook` is one torch hook on one module; it hands the module's tensor to its readers in the order the
sites come in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from mm_adapters._errors import AttentionUnreachableError
from mm_adapters.hooks.attention import AttentionInterceptor, Fire, IsLive, JointText
from mm_adapters.hooks.kept import Keep, Kept
from mm_adapters.hooks.point import Point, tracked
from mm_adapters.hooks.readers import Reader, TextLength
from mm_adapters.hooks.watchable import check_watchable

Side = Literal["input", "output", "inside"]
Slot = int | str | None


class ModuleHook:
    """One torch hook on one module, present only while a point that it feeds is live.

    Each reader has a slot, a name or a number: which of the module's arguments or outputs it reads. None is
    the first tensor.

    Args:
        module: The module that is hooked.
        side: Its input, its output, or (for an `AttentionHook`) what happens inside.
        packed: Whether its tensors have no batch axis; its readers are shown one row.
    """

    # What holds the module, under which name, and its tower: their state is checked before a hook goes on.
    home: tuple[str, nn.Module, nn.Module] | None = None
    # Where a module folds batch and positions into one axis: the hook of the block's input, which has both.
    unfolds: ModuleHook | None = None

    def __init__(self, module: nn.Module, side: Side, packed: bool = False) -> None:
        self.module = module
        self.side = side
        self.packed = packed
        self.block_input: Kept[Tensor] = Kept()
        self.readers: list[Reader | Keep[Any]] = []
        self.slots: list[Slot] = []
        self._n_live = 0
        self._handles: list[Any] = []

    def __reduce__(self) -> Any:
        # A copy of a module has copies of its torch hooks. They are of no model of ours: they do nothing.
        return _idle, (type(self), self.side)

    @property
    def live(self) -> bool:
        """Whether a point that it feeds is live."""
        return self._n_live > 0

    def check(self) -> None:
        """Raises: ModelStateError if the module is in a state in which its sites cannot be watched."""
        if self.home is not None:
            check_watchable(self.module, self.side, *self.home)

    def close(self) -> None:
        """Takes its torch hooks off for good: another one stands in its place."""
        self._n_live = 0
        self._detach()

    def add(self, reader: Reader | Keep[Any], slot: Slot = None, *, first: bool = False) -> None:
        """Adds a reader of what is in a slot, before the other readers if `first`."""
        at = 0 if first else len(self.readers)
        self.readers.insert(at, reader)
        self.slots.insert(at, slot)

    def count(self, change: int) -> None:
        """Counts live points up or down: the torch hook goes on with the first and off with the last."""
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
            return [self.module.register_forward_pre_hook(self.on_input, with_kwargs=True, prepend=True)]
        return [self.module.register_forward_hook(self.on_output, prepend=True)]

    def shown(self, value: Any, slot: Slot) -> Tensor:
        """What a reader is shown of the module's output, or of its args and kwargs."""
        if self.side == "output":
            at = key_of_tensor(value, slot)
            return self._rows_apart(value if at is None else value[at])
        args, kwargs = value
        plain = slot is None and args and isinstance(args[0], Tensor)
        at = 0 if plain else self._argument(args, kwargs, slot)
        return self._rows_apart(args[at] if isinstance(at, int) else kwargs[at])

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        """As a forward pre-hook: the arguments with what the readers changed, None if they are the same."""
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

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any):
        """As a forward hook: the output with what the readers changed, None if it is the same."""
        new = output
        for reader, slot in zip(self.readers, self.slots, strict=True):
            if reader.live:
                at = key_of_tensor(new, slot)
                x = new if at is None else new[at]
                y = self._read(reader, x)
                if y is not x:
                    new = _replaced(new, at, y)
        return None if new is output else new

    def _argument(self, args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot) -> int | str:
        if not isinstance(slot, str):
            return first_tensor(args, kwargs)
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
            block_input = self.block_input.value
            assert block_input is not None
            return x.reshape(*block_input.shape[:2], -1)
        return x.unsqueeze(0) if self.packed else x


class AttentionHook(ModuleHook):
    """Puts an `AttentionInterceptor` around one attention module's forward while a point of it is live."""

    def __init__(self, module: nn.Module, n_heads: int) -> None:
        super().__init__(module, "inside")
        self.n_heads = n_heads
        self.n_kv_heads = n_heads
        self.n_calls = 1
        self.points: dict[str, Point] = {}
        self.text: TextLength | None = None
        self.text_first = False
        self._interceptors: list[AttentionInterceptor] = []

    def _attach(self) -> list[Any]:
        return [
            self.module.register_forward_pre_hook(self._enter),
            self.module.register_forward_hook(self._leave, always_call=True, prepend=True),
        ]

    def _detach(self) -> None:
        super()._detach()
        self.unwind()

    def unwind(self) -> None:
        """Leaves the interceptors that an interrupted forward has not left."""
        while self._interceptors:
            self._interceptors.pop().__exit__(None, None, None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Its interceptors let every call pass inside, where another forward of the module may run."""
        waiting, self._interceptors = self._interceptors, []
        for interceptor in waiting:
            interceptor.is_paused = True
        try:
            yield
        finally:
            self.unwind()
            self._interceptors = waiting
            for interceptor in waiting:
                interceptor.is_paused = False

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.unwind()
        if not self.live:
            return
        self.check()
        interceptor = self.interceptor(self._fire, self._is_live)
        self._interceptors.append(interceptor)
        interceptor.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._interceptors:
            return
        interceptor = self._interceptors.pop()
        interceptor.__exit__(None, None, None)
        if not interceptor.calls and output is not None:
            live_sites = ", ".join(p.site.name for p in self.points.values() if p.live)
            raise AttentionUnreachableError(
                f"{live_sites}: {type(module).__name__} attended with a kernel that cannot be watched. "
                'Load the model with attn_implementation="sdpa" or "eager" (transformers), or set '
                "its attention backend to native (diffusers)."
            )

    def interceptor(self, fire: Fire, is_live: IsLive) -> AttentionInterceptor:
        """What takes this module's attention calls, and hands their values to `fire`."""
        n_text = self.text.n_text.value if self.text is not None else None
        joint = None if n_text is None else JointText(n_text, self.text_first)
        return AttentionInterceptor(fire, is_live, self.n_heads, self.n_kv_heads, joint, self.n_calls)

    def _is_live(self, name: str) -> bool:
        point = self.points.get(name)
        return point is not None and point.live

    def _fire(self, name: str, x: Tensor) -> Tensor:
        return self.points[name](x) if self._is_live(name) else x


def _idle(kind: type[ModuleHook], side: Side) -> ModuleHook:
    """One that feeds no point."""
    return AttentionHook(nn.Identity(), 1) if kind is AttentionHook else kind(nn.Identity(), side)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """The number or name of the first tensor among a module's arguments."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return i
    for name in ("hidden_states", "inputs_embeds", "sample", *kwargs):
        if isinstance(kwargs.get(name), Tensor):
            return name
    raise TypeError("The module was called without a tensor, so there is nothing to read at its input.")


def key_of_tensor(output: Any, slot: Slot) -> Any:
    """The key or number of a slot in a module's output, of None that of the first tensor; None if the output
    is a tensor itself.
    """
    if isinstance(output, Tensor):
        return None
    if slot is not None:
        return slot
    entries = enumerate(output) if isinstance(output, tuple | list) else output.items()
    return next(at for at, value in entries if isinstance(value, Tensor))


def _replaced(output: Any, at: Any, new: Tensor) -> Any:
    if at is None:
        return new
    if isinstance(output, tuple):
        return (*output[:at], new, *output[at + 1 :])
    output[at] = new
    return output
