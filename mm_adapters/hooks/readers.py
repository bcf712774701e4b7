"""Readers: what a site shows of a module's tensor, and how an edit of it goes back.

A reader turns the tensor that a tap hands it into the site's value (heads apart, one slice, a norm's
scale), fires the site's point, and returns the tensor with any edit in it. One that a later reader needs
something of keeps it, while that one listens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from mm_adapters.hooks.point import Listener, Point, show, tracked

if TYPE_CHECKING:
    pass


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
        return new if changed or tracked(new) else x


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
        if not changed and not tracked(new):
            return x
        joined = new if self.n_heads is None else _join(new)
        parts[which] = joined if self.gain is None else self.gain.undo(joined)
        return torch.cat(parts, dim=-1) if self.chunk else parts[0]


class ExpandBatch(Reader):
    """What the model computes once for all rows, shown once for each."""

    like: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        assert self.like is not None
        like, self.like = self.like, None
        shown = x.expand(like.shape[0], *x.shape[1:])
        new = self.points[0](shown)
        return x if new is shown and not tracked(new) else new


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
        if self.kind == "LN" and not tracked(wide):
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
        if not rescaled and not changed and not tracked(normalized):
            return x
        weight, bias = getattr(self.norm, "weight", None), getattr(self.norm, "bias", None)
        out = normalized if weight is None else normalized * (weight.float() + self.offset)
        out = out if bias is None else out + bias.float()
        return (out.squeeze(1) if pooled else out).to(x.dtype)


class KeepInput:
    """Keeps a tensor for a later reader of the same forward, while that one listens."""

    def __init__(self, reader: Listener, name: str) -> None:
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
        if changed or (self.points[0].live and tracked(new)):
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
        self.moved = new - x if changed or tracked(new) else None
        return x if self.moved is None else new


class CarryResidual(KeepInput):
    """Adds to the stream, where it comes out, what an edit has moved it by on the way."""

    def __call__(self, x: Tensor) -> Tensor:
        moved = getattr(self.reader, self.name)
        setattr(self.reader, self.name, None)
        return x if moved is None else x + moved


class KeepLength(KeepInput):
    """Keeps how many positions a tensor has."""

    def __call__(self, x: Tensor) -> Tensor:
        setattr(self.reader, self.name, x.shape[1])
        return x


class TextLength(Reader):
    """Knows how much of a joint attention is text, while its pattern onto the text is live."""

    n_text: int | None = None


def _split(x: Tensor, n_heads: int) -> Tensor:
    return rearrange(x, "... (h d) -> ... h d", h=n_heads)


def _join(x: Tensor) -> Tensor:
    return rearrange(x, "... h d -> ... (h d)")
