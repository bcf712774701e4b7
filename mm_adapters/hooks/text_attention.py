"""The part of a joint attention from image queries onto text keys, without the rest of the pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from mm_adapters.hooks.point import tracked

Fire = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class JointText:
    """Where text stands in a sequence of text and image."""

    n_text: int
    first: bool

    def split(self, n: int) -> tuple[slice, slice]:
        """The positions of the text and of the image, among `n`."""
        if self.first:
            return slice(0, self.n_text), slice(self.n_text, n)
        return slice(n - self.n_text, n), slice(0, n - self.n_text)


def attend_onto_text(
    fire: Fire,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_value"],
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    joint: JointText,
) -> Float[Tensor, "batch head query d_value"]:
    """Attention that fires only its pattern from image onto text.

    That part is exp(q k - logsumexp): the fused kernel returns each row's logsumexp, so the whole
    pattern, which is (text + image)^2, is never formed.

    Args:
        fire: Called with "pattern_text" and the value; returns it or an edited one.
        query: Per head, over text and image.
        key: With as many heads, or a divisor of them.
        value: As `key`.
        attn_mask: Additive, or boolean with True where a query may attend.
        is_causal: Must be False.
        scale: What scores are multiplied by; None is 1/sqrt(d_head).
        joint: Where text stands in the sequence.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = repeat(key, "b h n d -> b (h g) n d", g=groups)
        value = repeat(value, "b h n d -> b (h g) n d", g=groups)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if is_causal:
        raise NotImplementedError("A causal attention over text and image together cannot be watched.")
    out, total = fused(query, key, value, attn_mask, factor)
    text, image = joint.split(key.shape[-2])
    scores = (query[:, :, image] * factor) @ key[:, :, text].mT
    if attn_mask is not None:
        part = attn_mask.expand(*attn_mask.shape[:-2], query.shape[-2], key.shape[-2])[..., image, text]
        scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
    block = (scores.float() - total[:, :, image, None]).exp().to(query.dtype)
    new = fire("pattern_text", block.clone())  # A hook may write into it.
    change = new - block
    if not change.any():
        return out
    out = out.clone()
    out[:, :, image] += change @ value[:, :, text]
    return out


def fused(
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch head key d_head"],
    value: Float[Tensor, "batch head key d_value"],
    attn_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Float[Tensor, "batch head query"]]:
    """A fused kernel's attention, and each row's logsumexp of the scores, in float32."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    match query.device.type:
        case "cpu" if query.shape[-1] == value.shape[-1]:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, False, attn_mask=attn_mask, scale=scale
            )
        case "cuda" if attn_mask is None:
            out, total, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, None, True, scale=scale
            )
            return out, total[..., : query.shape[-2]]
    return by_rows(query, key, value, attn_mask, scale)


def by_rows(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float, size: int = 256
) -> tuple[Tensor, Tensor]:
    """As `fused`, where no kernel returns the logsumexp: `size` rows of the pattern at a time.

    Args:
        query: [batch, head, query, d_head].
        key: [batch, head, key, d_head].
        value: [batch, head, key, d_value].
        attn_mask: Additive, broadcast to the scores.
        scale: What scores are multiplied by.
        size: How many queries at a time.
    """
    outs, totals = [], []
    for start in range(0, query.shape[-2], size):
        rows = slice(start, start + size)
        scores = (query[:, :, rows] * scale) @ key.mT
        scores = scores if attn_mask is None else scores + attn_mask[:, :, rows]
        total = scores.float().logsumexp(-1)
        outs.append((scores.float() - total[..., None]).exp().to(value.dtype) @ value)
        totals.append(total)
    return torch.cat(outs, -2), torch.cat(totals, -1)


def onto_text(fire: Fire, pattern: Tensor, joint: JointText) -> Tensor:
    """A whole pattern whose part from image onto text was fired."""
    text, image = joint.split(pattern.shape[-1])
    block = pattern[:, :, image, text]
    new = fire("pattern_text", block)
    # A view of the pattern is not on the path to the output, so the fired part is put back.
    if new is block and not tracked(new):
        return pattern
    pattern = pattern.clone()
    pattern[:, :, image, text] = new
    return pattern
