"""Readers: what a site shows of a module's tensor, and how an edit of it goes back.

A reader turns the tensor that a module hook hands it into the site's value (heads apart, one slice, a
norm's scale), fires the site's point, and returns the tensor with any edit in it. What it needs of an
earlier module's tensor is in its `kept`.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from mm_adapters._errors import InputError
from mm_adapters.hooks.kept import Kept
from mm_adapters.hooks.point import Point, show, tracked
from mm_adapters.sites.held import held
from mm_adapters.sites.linear_map import bias_of, weight_of


class Reader:
    """Fires `points` with what the site shows of a tensor, and returns the tensor with any edit in it.

    `kept` is what another module's tensor must leave for it before it is called, if it needs one.
    """

    kept: Kept[Tensor] | None = None

    def __init__(self, *points: Point) -> None:
        self.points = points

    @property
    def live(self) -> bool:
        """Whether a hook is active on a point of it."""
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
        weight = held(self.block, self.name)
        return weight.tanh() if self.squash else weight

    def undo(self, x: Tensor) -> Tensor:
        """What the branch must return for `x` to join the stream.

        Raises: InputError if the gain is zero somewhere, so that nothing could.
        """
        gain = self()
        if not bool(gain.all()):
            raise InputError(
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
    """Shows once for each row what the model computes once for all. Kept is a tensor that has all rows."""

    kept: Kept[Tensor]

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        self.kept = Kept()

    def __call__(self, x: Tensor) -> Tensor:
        shown = x.expand(self.kept.take().shape[0], *x.shape[1:])
        new = self.points[0](shown)
        return x if new is shown and not tracked(new) else new


class NormReader(Reader):
    """A normalisation's denominator and its result before the affine map, both causal.

    Fired with a position axis even where the model normalises a pooled vector, as TransformerLens
    shapes them. Kept is the normalisation's input.
    """

    kept: Kept[Tensor]

    def __init__(
        self, scale: Point, normalized: Point, norm: nn.Module, kind: str, offset: float = 0.0
    ) -> None:
        super().__init__(scale, normalized)
        self.norm = norm
        self.kind = kind
        self.offset = offset
        self.kept = Kept()

    @property
    def live(self) -> bool:
        return self.points[0].live or self.points[1].live

    def __call__(self, x: Tensor) -> Tensor:
        scale_point, normalized_point = self.points
        source = self.kept.take()
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
        weight = None if getattr(self.norm, "weight", None) is None else weight_of(self.norm)
        bias = bias_of(self.norm)
        out = normalized if weight is None else normalized * (weight.float() + self.offset)
        out = out if bias is None else out + bias.float()
        out = (out.squeeze(1) if pooled else out).to(x.dtype)
        # Read but not edited: the model's own bits, with the gradient that reaches both points.
        return out if rescaled or changed else x.detach() + (out - out.detach())


class ResidualReader(Reader):
    """The stream after a branch is added: fires base + branch, and moves the branch by the edit.

    Kept is the base. `next_in_stream` are the readers whose base this stream is.
    """

    kept: Kept[Tensor]

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        self.kept = Kept()
        self.next_in_stream: list[ResidualReader] = []

    @property
    def live(self) -> bool:
        return super().live or any(r.live for r in self.next_in_stream)

    def __call__(self, x: Tensor) -> Tensor:
        base = self.kept.take()
        stream = base + x
        new, changed = show(self.points[0], stream)
        if changed or (self.points[0].live and tracked(new)):
            x = new - base
        for reader in self.next_in_stream:
            reader.kept.value = base + x
        return x


class StreamReader(Reader):
    """The stream where a module is given it. `moved` is what an edit has yet to add where it comes out."""

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        self.moved: Kept[Tensor] = Kept()

    def __call__(self, x: Tensor) -> Tensor:
        shown = x.clone()  # What is written into it would be in the stream already.
        new, changed = show(self.points[0], shown)
        edited = changed or tracked(new)
        self.moved.value = new - x if edited else None
        return new if edited else x


class TextLength(Reader):
    """Knows how much of a joint attention is text, while its pattern onto the text is live."""

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        self.n_text: Kept[int] = Kept()


def _split(x: Tensor, n_heads: int) -> Tensor:
    return rearrange(x, "... (h d) -> ... h d", h=n_heads)


def _join(x: Tensor) -> Tensor:
    return rearrange(x, "... h d -> ... (h d)")
