"""Attention by hand: the values that hooks see between q, k, v and z, whatever the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_adapters import InputError
from mm_adapters.hooks import eager
from mm_adapters.hooks.attention import AttentionInterceptor
from mm_adapters.hooks.module_hooks import first_tensor
from mm_adapters.hooks.point import check_like
from mm_adapters.hooks.text_attention import JointText, attend_onto_text, by_rows, fused


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Seen(dict):
    """What was fired, by name."""

    def __call__(self, name: str, x: Tensor) -> Tensor:
        self[name] = x.clone()
        return x


def watched(live: tuple[str, ...], **options: Any) -> tuple[AttentionInterceptor, Seen]:
    seen = Seen()
    options = {"n_heads": 2, "n_kv_heads": 2} | options
    return AttentionInterceptor(seen, lambda name: name in live, **options), seen


def test_a_paused_interceptor_takes_nothing() -> None:
    q, k, v = (normal(1, 2, 3, 4, seed=i) for i in range(3))
    interceptor, seen = watched(("pattern",))
    interceptor.is_paused = True
    with interceptor:
        z = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        total = torch.add(q, k)
    assert torch.equal(z, F.scaled_dot_product_attention(q, k, v, scale=0.5))
    assert torch.equal(total, q + k)
    assert (interceptor.calls, dict(seen)) == (0, {})
    interceptor.is_paused = False
    with interceptor:
        F.scaled_dot_product_attention(q, k, v, scale=0.5)
        F.scaled_dot_product_attention(q, k, v, scale=0.5)
    assert interceptor.calls == 1
    torch.testing.assert_close(seen["pattern"], (0.5 * q @ k.mT).softmax(-1))


@pytest.mark.parametrize("kernel", ["sdpa", "softmax"])
def test_packed_sequences_do_not_attend_to_each_other(kernel: str) -> None:
    """Sequences of 2 and 3, packed in one: each is as it is alone."""
    q, k, v = (normal(1, 2, 5, 4, seed=i) for i in range(3))

    def forward() -> Tensor:
        parts = [torch.split(x, [2, 3], dim=2) for x in (q, k, v)]
        z = []
        for a, b, c in zip(*parts, strict=True):
            if kernel == "sdpa":
                z.append(F.scaled_dot_product_attention(a, b, c))
            else:
                z.append(torch.softmax(a @ b.mT * 0.5, -1) @ c)
        return torch.cat(z, 2)

    alone = forward()
    interceptor, seen = watched(("pattern", "attn_scores"))
    with interceptor:
        together = forward()
    torch.testing.assert_close(together, alone)
    pattern = seen["pattern"]
    assert pattern.shape == (1, 2, 5, 5)
    assert not pattern[..., :2, 2:].any()
    assert not pattern[..., 2:, :2].any()
    torch.testing.assert_close(pattern[..., 2:, 2:], (q[:, :, 2:] @ k[:, :, 2:].mT * 0.5).softmax(-1))


@pytest.mark.parametrize(("dim", "sizes", "ndim"), [(1, [1, 1], 4), (2, 2, 4), (0, [2, 3], 1)])
def test_another_split_is_torchs_own(dim: int, sizes: Any, ndim: int) -> None:
    x = normal(1, 2, 5, 4) if ndim == 4 else normal(5)
    interceptor, _ = watched(("pattern",))
    with interceptor:
        parts = torch.split(x, sizes, dim=dim)
    for part, own in zip(parts, torch.split(x, sizes, dim=dim), strict=True):
        assert torch.equal(part, own)
    assert interceptor.lengths == []


@pytest.mark.parametrize("additive_too", [True, False])
@pytest.mark.parametrize("floating", [True, False])
def test_padded_keys_have_no_weight_in_multi_head_attention(floating: bool, additive_too: bool) -> None:
    """`key_padding_mask` [batch, key] and `attn_mask` [query, key] add up, as torch adds them."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    nn.init.normal_(attention.in_proj_bias)
    x = normal(2, 4, 8)
    hidden = torch.tensor([[False, False, False, True], [False, True, False, False]])
    pad = torch.zeros(2, 4).masked_fill(hidden, -torch.inf) if floating else hidden
    bias = normal(4, 4, seed=3) if additive_too else None
    if bias is not None and not floating:
        pad = torch.zeros(2, 4).masked_fill(hidden, -torch.inf)
    call = {"key_padding_mask": pad, "attn_mask": bias, "need_weights": True, "average_attn_weights": False}
    z, weights = attention(x, x, x, **call)
    interceptor, seen = watched(("pattern", "attn_scores"))
    with interceptor:
        shown = attention(x, x, x, **call)[0]
    torch.testing.assert_close(seen["pattern"], weights)
    torch.testing.assert_close(shown, z)
    assert not seen["pattern"][0, :, :, 3].any()
    assert not seen["pattern"][1, :, :, 1].any()


# --- the text's part of a joint attention -------------------------------------------------------


def joint_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1), scores.softmax(-1) @ v


@pytest.mark.parametrize("first", [True, False])
def test_grouped_keys_are_those_of_their_group_of_heads(first: bool) -> None:
    """4 heads, 2 of keys and values: heads 0 and 1 read the first. 2 positions are text, 3 the image."""
    q, k, v = normal(1, 4, 5, 8), normal(1, 2, 5, 8, seed=1), normal(1, 2, 5, 8, seed=2)
    of_head = [0, 0, 1, 1]
    pattern, z = joint_by_hand(q, k[:, of_head], v[:, of_head])
    seen = Seen()
    out = attend_onto_text(seen, q, k, v, None, False, None, JointText(2, first))
    torch.testing.assert_close(out, z)
    text, image = (slice(0, 2), slice(2, 5)) if first else (slice(3, 5), slice(0, 3))
    torch.testing.assert_close(seen["pattern_text"], pattern[:, :, image, text])
    out = attend_onto_text(lambda name, x: x * 0, q, k, v, None, False, None, JointText(2, first))
    cut = pattern.clone()
    cut[:, :, image, text] = 0
    torch.testing.assert_close(out, cut @ v[:, of_head])


def test_a_boolean_mask_hides_keys_of_a_joint_attention() -> None:
    q, k, v = (normal(2, 2, 5, 8, seed=i) for i in range(3))
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., 1] = False  # Text.
    mask[0, ..., 4] = False  # Image.
    pattern, z = joint_by_hand(q, k, v, mask)
    seen = Seen()
    out = attend_onto_text(seen, q, k, v, mask, False, None, JointText(2, True))
    torch.testing.assert_close(out, z)
    torch.testing.assert_close(seen["pattern_text"], pattern[:, :, 2:, :2])
    total = (q @ k.mT * 0.3).masked_fill(~mask, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(fused(q, k, v, mask, 0.3)[1], total)


def test_a_joint_attention_is_not_causal() -> None:
    q, k, v = (normal(1, 2, 5, 8, seed=i) for i in range(3))
    with pytest.raises(NotImplementedError, match="A causal attention over text and image together"):
        attend_onto_text(Seen(), q, k, v, None, True, None, JointText(2, True))


@pytest.mark.parametrize("size", [2, 5, 256])
def test_a_few_rows_at_a_time_are_all_rows(size: int) -> None:
    """Values narrower than the keys, which no fused kernel takes."""
    q, k, v = normal(1, 2, 5, 8), normal(1, 2, 6, 8, seed=1), normal(1, 2, 6, 4, seed=2)
    mask = normal(1, 2, 5, 6, seed=3)
    scores = q @ k.mT * 0.3 + mask
    out, total = by_rows(q, k, v, mask, 0.3, size=size)
    torch.testing.assert_close(out, scores.softmax(-1) @ v)
    torch.testing.assert_close(total, scores.logsumexp(-1))
    out, total = fused(q, k, v, mask, 0.3)
    torch.testing.assert_close((out, total), (scores.softmax(-1) @ v, scores.logsumexp(-1)))


# --- points and modules -------------------------------------------------------------------------


def test_what_a_hook_returns_can_stand_in_the_values_place() -> None:
    x = torch.zeros(2, 3)
    for new in ("text", 3, [x], (x,)):
        with pytest.raises(InputError, match=f"at a.b returned {type(new).__name__}. It returns a tensor"):
            check_like("a.b", x, new)
    with pytest.raises(InputError, match=r"was given \(2, 3\) and returned \(1, 3\)"):
        check_like("a.b", x, x[:1])
    with pytest.raises(InputError, match=r"at a\.b was given torch\.float32 and returned complex"):
        check_like("a.b", x, x.to(torch.complex64))
    check_like("a.b", x, x.double())
    check_like("a.b", x.to(torch.complex64), x.to(torch.complex64))


def test_the_first_tensor_among_a_modules_arguments() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert first_tensor((None, a, b), {"hidden_states": b}) == 1
    assert first_tensor((None,), {"x": b, "sample": a, "hidden_states": b}) == "hidden_states"
    assert first_tensor((), {"x": b, "inputs_embeds": a, "sample": b}) == "inputs_embeds"
    assert first_tensor((), {"x": b, "sample": a}) == "sample"
    assert first_tensor((), {"flag": True, "x": b}) == "x"
    with pytest.raises(TypeError, match="without a tensor, so there is nothing to read at its input"):
        first_tensor((1, None), {"hidden_states": None, "x": [a]})


def test_nothing_is_compiled_before_torchs_compiler_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    layer = nn.Linear(2, 2)
    wrapped = nn.Module()
    wrapped._modules["_orig_mod"] = layer
    monkeypatch.setitem(sys.modules, "torch._dynamo", nn)  # Only its name counts.
    assert not eager.is_compiled([layer])
    assert eager.is_compiled([layer, wrapped])
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    assert not eager.is_compiled([wrapped])
    monkeypatch.setitem(sys.modules, "torch._dynamo", nn)
    layer._compiled_call_impl = lambda x: x
    assert eager.is_compiled([layer])
