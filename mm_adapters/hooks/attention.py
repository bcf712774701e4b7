"""What happens between q, k, v and z, whichever kernel the model calls: one interceptor for all.

While no hook is active on a module's scores or pattern nothing here runs, and the model keeps its fused
kernel. While one is, a TorchFunctionMode is active in that module's forward alone, and takes the one
call that attends: `scaled_dot_product_attention`, `multi_head_attention_forward` or, in modelling code
that writes attention out, the softmax.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from mm_adapters.hooks.point import tracked
from mm_adapters.hooks.text_attention import Fire, JointText, attend_onto_text, onto_text

IsLive = Callable[[str], bool]


def in_call(name: str, call: int) -> str:
    """A value's name in the `call`-th of a module's attention calls."""
    return f"{name}.{call}" if call else name


class AttentionInterceptor(TorchFunctionMode):
    """Takes the attention calls in one module's forward and hands their values to `fire(name, value)`.

    While neither scores nor pattern are live the module's own kernel is called. `calls` counts the attention
    calls taken. Code that cuts packed sequences apart, to attend to each alone, gets them back whole:
    `lengths` are what it would have cut, and become a mask.

    Args:
        fire: Called with a value's name and the value; returns it or an edited one.
        is_live: Whether a hook is active on the value of this name.
        n_heads: How many heads the queries have.
        n_kv_heads: How many heads the keys and values have.
        joint: Where text stands in the sequence, if text and image attend together.
        n_calls: How often the module attends (to an image prompt, beside the text); the names of what is in
            later calls end with their number.
    """

    def __init__(
        self,
        fire: Fire,
        is_live: IsLive,
        n_heads: int,
        n_kv_heads: int,
        joint: JointText | None = None,
        n_calls: int = 1,
    ) -> None:
        super().__init__()
        self._fire = fire
        self._is_live = is_live
        self.n_calls = n_calls
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.joint = joint
        self.calls = 0
        self.is_paused = False
        self.lengths: list[int] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.is_paused:
            return func(*args, **(kwargs or {}))
        if func is torch.split and not self.calls and self._splits_packed(*args, **(kwargs or {})):
            return (args[0],)
        if func not in KERNELS or self.calls >= self.n_calls:
            return func(*args, **kwargs) if kwargs else func(*args)
        self.calls += 1
        return KERNELS[func](self, func, *args, **(kwargs or {}))

    def fire(self, name: str, x: Tensor) -> Tensor:
        """What a value of this call is replaced by."""
        return self._fire(in_call(name, self.calls - 1), x)

    def is_live(self, name: str) -> bool:
        """Whether a hook is active on this value of this call."""
        return self._is_live(in_call(name, self.calls - 1))

    def _splits_packed(self, tensor: Tensor, lengths: Any = None, dim: int = 0) -> bool:
        """Whether this is q, k or v [1, head, pos, d], cut along its positions."""
        if tensor.ndim != 4 or dim != 2 or not isinstance(lengths, list):
            return False
        self.lengths = lengths
        return True

    def packed_mask(self, scores: Tensor) -> Tensor:
        """True where query and key are of the same sequence."""
        of = torch.repeat_interleave(torch.tensor(self.lengths, device=scores.device))
        return of[:, None] == of


def attend(
    fire: Fire,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_value"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    joint: JointText | None = None,
    kernel: Callable[[], Tensor] | None = None,
) -> Float[Tensor, "batch head query d_value"]:
    """Attention that fires its scores and its pattern. The softmax is taken in float32.

    If neither was changed, the result is that of the model's own kernel: reading leaves the output
    bit-identical. Where autograd follows, the gradient goes through scores and pattern.

    Args:
        fire: Called with "attn_scores" or "pattern" and the value; returns it or an edited one.
        query: Per head, as in `scaled_dot_product_attention`.
        key: With as many heads, or a divisor of them.
        value: As `key`.
        attn_mask: Additive, or boolean with True where a query may attend.
        dropout_p: The share of the pattern that is dropped.
        is_causal: Whether later keys are masked.
        scale: What scores are multiplied by; None is 1/sqrt(d_head).
        joint: Where text stands, if the text's part of the pattern is fired too.
        kernel: The model's own attention on the same arguments.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = repeat(key, "b h n d -> b (h g) n d", g=groups)
        value = repeat(value, "b h n d -> b (h g) n d", g=groups)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    scores, moved = _shown(fire, "attn_scores", scores)
    masked = attn_mask is not None
    # A row that may attend to nothing gives zeros, as the fused kernels do, not NaN.
    softmax = torch.ops.aten._safe_softmax if masked else torch.softmax
    pattern = softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    del scores
    pattern, moved_too = _shown(fire, "pattern", pattern)
    if joint is not None:
        pattern = onto_text(fire, pattern, joint)
    elif kernel is not None and not (moved or moved_too):
        if not pattern.requires_grad:
            del pattern
            return kernel()
        if not dropout_p:
            formed = pattern @ value
            return kernel().detach() + (formed - formed.detach())
    return F.dropout(pattern, dropout_p) @ value if dropout_p else pattern @ value


def _shown(fire: Fire, name: str, x: Tensor) -> tuple[Tensor, bool]:
    """What a site's point returns, and whether it changed: was replaced, or written into."""
    if x.is_inference() or isinstance(x, FakeTensor):  # They do not say if they were written into.
        return fire(name, x), True
    version = x._version
    new = fire(name, x)
    return new, x._version != version or not (new is x or torch.equal(new, x))


def _take_sdpa(
    interceptor: AttentionInterceptor,
    func: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    query = _through(interceptor, "q", query)
    key = _through_groups(interceptor, "k", key)
    value = _through_groups(interceptor, "v", value)
    query = _through(interceptor, "rot_q", query)
    key = _through_groups(interceptor, "rot_k", key)

    def kernel() -> Tensor:
        grouped = {"enable_gqa": True} if enable_gqa else {}
        return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **grouped)

    if interceptor.lengths and attn_mask is None:
        attn_mask = interceptor.packed_mask(query)
    joint = interceptor.joint if interceptor.is_live("pattern_text") else None
    is_open = interceptor.is_live("attn_scores") or interceptor.is_live("pattern")
    if is_open or (joint and (tracked(query) or tracked(key) or dropout_p)):
        z = attend(interceptor.fire, query, key, value, attn_mask, dropout_p, is_causal, scale, joint, kernel)
    elif joint is not None:
        z = attend_onto_text(interceptor.fire, query, key, value, attn_mask, is_causal, scale, joint)
    else:
        z = kernel()
    return _through(interceptor, "z", z)


def _take_softmax(
    interceptor: AttentionInterceptor, func: Callable[..., Tensor], scores: Tensor, *args: Any, **kw: Any
):
    folded = scores.ndim == 3  # [(batch head), query, key]
    if folded:
        scores = rearrange(scores, "(b h) q k -> b h q k", h=interceptor.n_heads)
    if interceptor.lengths:
        scores = scores.masked_fill(~interceptor.packed_mask(scores), -torch.inf)
    pattern = interceptor.fire("pattern", func(interceptor.fire("attn_scores", scores), *args, **kw))
    return rearrange(pattern, "b h q k -> (b h) q k") if folded else pattern


def _take_mha(interceptor: AttentionInterceptor, func: Callable[..., Any], *args: Any, **kwargs: Any):
    call = dict(zip(_MHA_ARGUMENTS, args, strict=False)) | kwargs
    unusual = [n for n in ("bias_k", "bias_v", "static_k", "static_v") if call.get(n) is not None]
    if unusual or call.get("add_zero_attn"):
        raise NotImplementedError(
            f"multi_head_attention_forward with {unusual or 'add_zero_attn'} cannot be watched."
        )
    n_heads = call["num_heads"]
    weights = (
        tuple(call[f"{n}_proj_weight"] for n in "qkv")
        if call.get("use_separate_proj_weight")
        else call["in_proj_weight"].chunk(3)
    )
    bias = call.get("in_proj_bias")
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    streams = []
    for name, x, w, b in zip(
        "qkv", (call["query"], call["key"], call["value"]), weights, biases, strict=True
    ):
        heads = rearrange(F.linear(x, w, b), "n b (h d) -> b n h d", h=n_heads)
        streams.append(rearrange(interceptor.fire(name, heads), "b n h d -> b h n d"))
    z = attend(
        interceptor.fire,
        *streams,
        attn_mask=_mha_mask(call, n_heads),
        dropout_p=call.get("dropout_p", 0.0) if call.get("training", True) else 0.0,
    )
    z = interceptor.fire("z", rearrange(z, "b h n d -> b n h d"))
    out = F.linear(rearrange(z, "b n h d -> n b (h d)"), call["out_proj_weight"], call["out_proj_bias"])
    return out, None


def _mha_mask(call: Mapping[str, Any], n_heads: int) -> Tensor | None:
    """The additive [batch, head, query, key] mask of a call whose True means "not this one"."""
    mask, pad = call.get("attn_mask"), call.get("key_padding_mask")

    def additive(m: Tensor) -> Tensor:
        if m.dtype != torch.bool:
            return m
        return torch.zeros_like(m, dtype=call["query"].dtype).masked_fill(m, -torch.inf)

    if mask is not None:
        mask = additive(mask)
        mask = rearrange(mask, "(b h) q k -> b h q k", h=n_heads) if mask.ndim == 3 else mask
    if pad is not None:
        pad = rearrange(additive(pad), "b k -> b 1 1 k")
        mask = pad if mask is None else mask + pad
    return mask


def _through(interceptor: AttentionInterceptor, name: str, x: Tensor) -> Tensor:
    """Fires [batch, head, pos, d] as TransformerLens shapes it: [batch, pos, head, d]."""
    if not interceptor.is_live(name):
        return x
    shown = rearrange(x, "b h n d -> b n h d")
    new = interceptor.fire(name, shown)
    if new is shown and not tracked(new):
        return x
    return rearrange(new, "b n h d -> b h n d")


def _through_groups(interceptor: AttentionInterceptor, name: str, x: Tensor) -> Tensor:
    """As `_through`, each grouped head once: the library may have repeated them already."""
    repeated = x.shape[1] // interceptor.n_kv_heads
    shown = x[:, ::repeated]
    new = _through(interceptor, name, shown)
    return x if new is shown else repeat(new, "b h n d -> b (h g) n d", g=repeated)


_MHA_ARGUMENTS = tuple(inspect.signature(F.multi_head_attention_forward).parameters)

KERNELS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _take_sdpa,
    F.multi_head_attention_forward: _take_mha,
    F.softmax: _take_softmax,
    torch.softmax: _take_softmax,
    Tensor.softmax: _take_softmax,
}
