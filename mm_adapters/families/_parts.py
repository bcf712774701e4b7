"""Words that family records are made of: an attention, a norm, an MLP, each as its sites."""

from __future__ import annotations

from typing import Literal

from mm_adapters._spec import Attention, Input, Inside, Norm, Output, Place


def attention(
    path: str,
    *,
    q: str = "q_proj",
    k: str = "k_proj",
    v: str = "v_proj",
    o: str = "out_proj",
    heads: str = "num_heads",
    kv_heads: str | None = None,
    rotary: bool = False,
    name: str = "attn",
) -> dict[str, Place]:
    """An attention module with a projection module each for q, k, v and the output.

    `heads` and `kv_heads` are attributes of the attention module. Each name may be several, with "|".
    """
    n = _each(f"{path}:", heads)
    n_kv = _each(f"{path}:", kv_heads or heads)
    parts: dict[str, Place] = {
        f"{name}.hook_q": Output(_each(f"{path}.", q), n),
        f"{name}.hook_k": Output(_each(f"{path}.", k), n_kv),
        f"{name}.hook_v": Output(_each(f"{path}.", v), n_kv),
    }
    if rotary:
        parts[f"{name}.hook_rot_q"] = Attention(path, "rot_q", n)
        parts[f"{name}.hook_rot_k"] = Attention(path, "rot_k", n_kv)
    return parts | {
        f"{name}.hook_attn_scores": Attention(path, "attn_scores", n),
        f"{name}.hook_pattern": Attention(path, "pattern", n),
        f"{name}.hook_z": Input(_each(f"{path}.", o), n),
    }


def _each(start: str, names: str) -> str:
    return "|".join(start + name for name in names.split("|"))


def inside(path: str, heads: str, *values: Inside, name: str = "attn") -> dict[str, Place]:
    """What an attention module's own call to a kernel is given and gives."""
    return {f"{name}.hook_{value}": Attention(path, value, f"{path}:{heads}") for value in values}


def fused_attention(path: str, *, heads: str = "num_heads", name: str = "attn") -> dict[str, Place]:
    """An nn.MultiheadAttention: projections and attention in one call."""
    return inside(path, heads, "q", "k", "v", "attn_scores", "pattern", "z", name=name)


def norm(path: str, name: str, kind: Literal["LN", "RMS"] = "LN") -> dict[str, Place]:
    """A LayerNorm or an RMSNorm: its scale and its result before the affine map."""
    return {
        f"{name}.hook_scale": Norm(path, "scale", kind),
        f"{name}.hook_normalized": Norm(path, "normalized", kind),
    }


def mlp(path: str, *, up: str, down: str) -> dict[str, Place]:
    """Up, activation, down."""
    return {"mlp.hook_pre": Output(f"{path}.{up}"), "mlp.hook_post": Input(f"{path}.{down}")}


def gated_mlp(path: str, *, gate: str, up: str, down: str) -> dict[str, Place]:
    """Down(act(gate) * up), as in Llama: `hook_pre` is the gate's, `hook_pre_linear` the other."""
    return {
        "mlp.hook_pre": Output(f"{path}.{gate}"),
        "mlp.hook_pre_linear": Output(f"{path}.{up}"),
        "mlp.hook_post": Input(f"{path}.{down}"),
    }
