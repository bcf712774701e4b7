"""Taps on an untouched model: a torch hook is there only while somebody listens.

A `Tap` is one torch hook on one module; it hands the module's tensor to its readers in the order the
sites come in. A reader turns that tensor into what the site shows (heads apart, one slice, a norm's
scale), fires the site's point, and puts an edit back.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor, nn

from mm_adapters._attention import Watch
from mm_adapters._errors import AttentionUnreachableError
from mm_adapters._spec import Site

Side = Literal["input", "output", "inside"]


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


class View(Reader):
    """A part of the last axis, its heads apart."""

    def __init__(self, point: Point, n_heads: int | None, chunk: tuple[int, int] | None) -> None:
        super().__init__(point)
        self.n_heads = n_heads
        self.chunk = chunk

    def __call__(self, x: Tensor) -> Tensor:
        parts = list(x.chunk(self.chunk[0], dim=-1)) if self.chunk else [x]
        which = self.chunk[1] if self.chunk else 0
        part = parts[which]
        shown = part if self.n_heads is None else _split(part, self.n_heads)
        new = self.points[0](shown)
        if new is shown and not _tracked(new):
            return x
        parts[which] = new if self.n_heads is None else _join(new)
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

    def __init__(self, scale: Point, normalized: Point, norm: nn.Module, kind: str) -> None:
        super().__init__(scale, normalized)
        self.norm = norm
        self.kind = kind
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
        scale = scale_point(denominator)
        if ratio is None or scale is not denominator:
            ratio = (wide - mean) / scale
        normalized = normalized_point(ratio)
        if scale is denominator and normalized is ratio and not _tracked(normalized):
            return x
        weight, bias = getattr(self.norm, "weight", None), getattr(self.norm, "bias", None)
        out = normalized if weight is None else normalized * weight.float()
        out = out if bias is None else out + bias.float()
        return (out.squeeze(1) if pooled else out).to(x.dtype)


class Keep:
    """Keeps a tensor for a later reader of the same forward, while that one listens."""

    def __init__(self, reader: Reader, name: str) -> None:
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
        new = self.points[0](stream)
        if new is not stream or (self.points[0].live and _tracked(new)):
            x = new - base
        for reader in self.kept_for:
            reader.base = base + x
        return x


class Tap:
    """One torch hook on one module, present only while a point that it feeds is live."""

    def __init__(self, module: nn.Module, side: Side) -> None:
        self.module = module
        self.side = side
        self.readers: list[Reader | Keep] = []
        self._n_live = 0
        self._handles: list[Any] = []

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
        slot = _first_tensor(args, kwargs)
        x = args[slot] if isinstance(slot, int) else kwargs[slot]
        new = self._read(x)
        if new is x:
            return None
        if isinstance(slot, int):
            return (*args[:slot], new, *args[slot + 1 :]), kwargs
        return args, {**kwargs, slot: new}

    def _returned(self, module: nn.Module, args: tuple[Any, ...], output: Any):
        x = _tensor_of(output)
        new = self._read(x)
        return None if new is x else _with_tensor(output, new)

    def _read(self, x: Tensor) -> Tensor:
        for reader in self.readers:
            if reader.live:
                x = reader(x)
        return x


class AttentionTap(Tap):
    """Inside one attention module: a `Watch` that stands there while a point listens."""

    def __init__(self, module: nn.Module, n_heads: int) -> None:
        super().__init__(module, "inside")
        self.n_heads = n_heads
        self.n_kv_heads = n_heads
        self.points: dict[str, Point] = {}
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
        watch = Watch(self._fire, self.n_heads, self.n_kv_heads)
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

    def _fire(self, name: str, x: Tensor) -> Tensor:
        point = self.points.get(name)
        return x if point is None or not point.live else point(x)


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


def _tensor_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return next(v for v in _entries(output) if isinstance(v, Tensor))


def _with_tensor(output: Any, new: Tensor) -> Any:
    if isinstance(output, Tensor):
        return new
    if isinstance(output, tuple):
        i = next(i for i, v in enumerate(output) if isinstance(v, Tensor))
        return (*output[:i], new, *output[i + 1 :])
    name = next(n for n, v in output.items() if isinstance(v, Tensor))
    output[name] = new
    return output


def _entries(output: Any) -> Any:
    return output if isinstance(output, tuple | list) else output.values()

