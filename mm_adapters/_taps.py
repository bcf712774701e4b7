"""Taps on an untouched model: a torch hook is there only while somebody listens.

A `Tap` is one torch hook on one module; it hands the module's tensor to its readers in the order the
sites come in. A reader turns that tensor into what the site shows (heads apart, one slice, a norm's
scale), fires the site's point, and puts an edit back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor, nn

from mm_adapters._attention import JointText, Watch
from mm_adapters._errors import AttentionUnreachableError
from mm_adapters._spec import Site

Side = Literal["input", "output", "inside"]
Slot = int | str | None


@runtime_checkable
class Point(Protocol):
    """Where a site shows itself: called with a value, it returns the value or an edited one."""

    @property
    def site(self) -> Site: ...

    @property
    def live(self) -> bool: ...

    @property
    def taps(self) -> list[Tap]: ...

    def __call__(self, x: Tensor) -> Tensor: ...


def show(point: Point, x: Tensor) -> tuple[Tensor, bool]:
    """What a point gives for a value, and whether that is another value: a hook may write into it."""
    version = None if x.is_inference() else x._version
    new = point(x)
    return new, new is not x or (version is not None and x._version != version)


class Reader:
    """Fires `points` with what the site shows of a tensor, and returns the tensor with any edit in it."""

    def __init__(self, *points: Point) -> None:
        self.points = points

    @property
    def live(self) -> bool:
        """Whether anybody listens."""
        return self.points[0].live

    def __call__(self, x: Tensor) -> Tensor:
        return self.points[0](x)


class Copy(Reader):
    """Shows a copy of what the model goes on to change in place."""

    def __call__(self, x: Tensor) -> Tensor:
        shown = x.clone()
        new, changed = show(self.points[0], shown)
        return new if changed or _tracked(new) else x


class Gain:
    """What a block multiplies a branch by: one of its parameters, or the tanh of it."""

    def __init__(self, block: nn.Module, name: str, squash: bool) -> None:
        self.block = block
        self.name = name
        self.squash = squash

    def __call__(self) -> Tensor:
        weight = getattr(self.block, self.name)
        return weight.tanh() if self.squash else weight

    def undo(self, x: Tensor) -> Tensor:
        """What the branch must return for `x` to join the stream.

        Raises: ValueError if the gain is zero somewhere, so that nothing could.
        """
        gain = self()
        if not bool(gain.all()):
            raise ValueError(
                f"{self.name} is zero, so nothing that the branch returns joins the stream there. Edit the "
                "residual stream (hook_resid_mid, hook_resid_post) instead."
            )
        return x / gain


class View(Reader):
    """A part of the last axis, its heads apart, times a gain."""

    def __init__(
        self, point: Point, n_heads: int | None, chunk: tuple[int, int] | None, gain: Gain | None = None
    ) -> None:
        super().__init__(point)
        self.n_heads = n_heads
        self.chunk = chunk
        self.gain = gain

    def __call__(self, x: Tensor) -> Tensor:
        parts = list(x.chunk(self.chunk[0], dim=-1)) if self.chunk else [x]
        which = self.chunk[1] if self.chunk else 0
        part = parts[which] if self.gain is None else parts[which] * self.gain()
        shown = part if self.n_heads is None else _split(part, self.n_heads)
        new, changed = show(self.points[0], shown)
        if not changed and not _tracked(new):
            return x
        joined = new if self.n_heads is None else _join(new)
        parts[which] = joined if self.gain is None else self.gain.undo(joined)
        return torch.cat(parts, dim=-1) if self.chunk else parts[0]


class Spread(Reader):
    """What the model computes once for all rows, shown once for each."""

    like: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        assert self.like is not None
        like, self.like = self.like, None
        shown = x.expand(like.shape[0], *x.shape[1:])
        new = self.points[0](shown)
        return x if new is shown and not _tracked(new) else new


class NormReader(Reader):
    """A normalisation's denominator and its result before the affine map, both causal.

    Fired with a position axis even where the model normalises a pooled vector, as TransformerLens
    shapes them.
    """

    def __init__(
        self, scale: Point, normalized: Point, norm: nn.Module, kind: str, offset: float = 0.0
    ) -> None:
        super().__init__(scale, normalized)
        self.norm = norm
        self.kind = kind
        self.offset = offset
        self.source: Tensor | None = None

    @property
    def live(self) -> bool:
        return self.points[0].live or self.points[1].live

    def __call__(self, x: Tensor) -> Tensor:
        scale_point, normalized_point = self.points
        assert self.source is not None
        source, self.source = self.source, None
        pooled = source.ndim == 2
        wide = (source.unsqueeze(1) if pooled else source).float()
        eps = getattr(self.norm, "eps", None) or getattr(self.norm, "variance_epsilon", 0.0)
        if self.kind == "LN" and not _tracked(wide):
            # One fused pass; it gives no gradient of the denominator, so only where none is wanted.
            ratio, mean, inverse = torch.native_layer_norm(wide, wide.shape[-1:], None, None, eps)
            denominator = inverse.reciprocal()
        else:
            mean = wide.mean(-1, keepdim=True) if self.kind == "LN" else 0.0
            denominator = ((wide - mean).square().mean(-1, keepdim=True) + eps).sqrt()
            ratio = None
        scale, rescaled = show(scale_point, denominator)
        if ratio is None or rescaled:
            ratio = (wide - mean) / scale
        normalized, changed = show(normalized_point, ratio)
        if not rescaled and not changed and not _tracked(normalized):
            return x
        weight, bias = getattr(self.norm, "weight", None), getattr(self.norm, "bias", None)
        out = normalized if weight is None else normalized * (weight.float() + self.offset)
        out = out if bias is None else out + bias.float()
        return (out.squeeze(1) if pooled else out).to(x.dtype)


class Keep:
    """Keeps a tensor for a later reader of the same forward, while that one listens."""

    def __init__(self, reader: Reader | Tap, name: str) -> None:
        self.reader = reader
        self.name = name

    @property
    def live(self) -> bool:
        return self.reader.live

    def __call__(self, x: Tensor) -> Tensor:
        setattr(self.reader, self.name, x)
        return x


class ResidualReader(Reader):
    """The stream after a branch is added: fires base + branch, and moves the branch by the edit."""

    base: Tensor | None = None
    kept_for: list[ResidualReader]

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        self.kept_for = []

    @property
    def live(self) -> bool:
        return super().live or any(r.live for r in self.kept_for)

    def __call__(self, x: Tensor) -> Tensor:
        assert self.base is not None
        base, self.base = self.base, None
        stream = base + x
        new, changed = show(self.points[0], stream)
        if changed or (self.points[0].live and _tracked(new)):
            x = new - base
        for reader in self.kept_for:
            reader.base = base + x
        return x


class StreamReader(Reader):
    """The stream where a module is given it. `moved` is what an edit has yet to add where it comes out."""

    moved: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        shown = x.clone()  # What is written into it would be in the stream already.
        new, changed = show(self.points[0], shown)
        self.moved = new - x if changed or _tracked(new) else None
        return x if self.moved is None else new


class Carry(Keep):
    """Adds to the stream, where it comes out, what an edit has moved it by on the way."""

    def __call__(self, x: Tensor) -> Tensor:
        moved = getattr(self.reader, self.name)
        setattr(self.reader, self.name, None)
        return x if moved is None else x + moved


class Length(Keep):
    """Keeps how many positions a tensor has."""

    def __call__(self, x: Tensor) -> Tensor:
        setattr(self.reader, self.name, x.shape[1])
        return x


class Text(Reader):
    """Knows how much of a joint attention is text, while its pattern onto the text is live."""

    n_text: int | None = None


class Tap:
    """One torch hook on one module, present only while a point that it feeds is live.

    `packed`: the module's tensors have no batch axis; its readers are shown one row. `unfolds`: the
    tap of the block's input, whose batch and positions this module's tensors have in one axis. Each
    reader has a slot: which of the things that the module is given or returns is its own, a name or a
    number; None is the first tensor.
    """

    unfolds: Tap | None = None
    block_input: Tensor | None = None

    def __init__(self, module: nn.Module, side: Side, packed: bool = False) -> None:
        self.module = module
        self.side = side
        self.packed = packed
        self.readers: list[Reader | Keep] = []
        self.slots: list[Slot] = []
        self._n_live = 0
        self._handles: list[Any] = []

    @property
    def live(self) -> bool:
        """Whether a point that it feeds is live."""
        return self._n_live > 0

    def add(self, reader: Reader | Keep, slot: Slot = None, *, first: bool = False) -> None:
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
        if new is shown and (shown is x or not _tracked(new)):
            return x
        new = new if shown is x else new.reshape(x.shape)
        # Modelling code takes views of what its modules give.
        return new.contiguous() if x.is_contiguous() else new

    def _rows_apart(self, x: Tensor) -> Tensor:
        if self.unfolds is not None:
            assert self.block_input is not None
            return x.reshape(*self.block_input.shape[:2], -1)
        return x.unsqueeze(0) if self.packed else x


class AttentionTap(Tap):
    """Inside one attention module: a `Watch` that stands there while a point listens."""

    def __init__(self, module: nn.Module, n_heads: int) -> None:
        super().__init__(module, "inside")
        self.n_heads = n_heads
        self.n_kv_heads = n_heads
        self.points: dict[str, Point] = {}
        self.text: Text | None = None
        self.text_first = False
        self._watches: list[Watch] = []

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

    def watch(self, fire: Any, wants: Any) -> Watch:
        """What stands in this module while it attends."""
        n_text = self.text.n_text if self.text is not None else None
        joint = None if n_text is None else JointText(n_text, self.text_first)
        return Watch(fire, wants, self.n_heads, self.n_kv_heads, joint)

    def _wants(self, name: str) -> bool:
        point = self.points.get(name)
        return point is not None and point.live

    def _fire(self, name: str, x: Tensor) -> Tensor:
        return self.points[name](x) if self._wants(name) else x


def _tracked(x: Tensor) -> bool:
    # A site must lie on the path to the output for its gradient to exist.
    return x.requires_grad and torch.is_grad_enabled()


def _split(x: Tensor, n_heads: int) -> Tensor:
    return rearrange(x, "... (h d) -> ... h d", h=n_heads)


def _join(x: Tensor) -> Tensor:
    return rearrange(x, "... h d -> ... (h d)")


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
