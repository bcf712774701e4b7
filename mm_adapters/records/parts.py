"""Words that family records are made of: an attention, a norm, an MLP, each as its sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from mm_adapters.records.spec import Attention, Input, Inside, Location, Norm, Output, Residual


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
    out: str | None = None,
    beside: Mapping[str, Location] | None = None,
) -> dict[str, Location]:
    """An attention module with a projection module each for q, k, v and the output.

    `heads` and `kv_heads` are attributes of the attention module. Each name may be several, with "|".
    `out` is the output projection's path from the block, where it is not inside. `beside` is what else
    the module attends to before that projection.
    """
    n = _each(f"{path}:", heads)
    n_kv = _each(f"{path}:", kv_heads or heads)
    parts: dict[str, Location] = {
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
        **(beside or {}),
        f"{name}.hook_z": Input(out or _each(f"{path}.", o), n),
    }


def qkv_attention(
    path: str, *, qkv: str = "qkv", o: str = "proj", heads: str = "num_heads", rotary: bool = False
) -> dict[str, Location]:
    """An attention module with one projection for q, k and v, in that order, and one for the output."""
    n = f"{path}:{heads}"
    parts: dict[str, Location] = {
        f"attn.hook_{name}": Output(f"{path}.{qkv}", n, chunk=(3, i)) for i, name in enumerate("qkv")
    }
    if rotary:
        parts["attn.hook_rot_q"] = Attention(path, "rot_q", n)
        parts["attn.hook_rot_k"] = Attention(path, "rot_k", n)
    return parts | {
        "attn.hook_attn_scores": Attention(path, "attn_scores", n),
        "attn.hook_pattern": Attention(path, "pattern", n),
        "attn.hook_z": Input(f"{path}.{o}", n),
    }


def _each(start: str, names: str) -> str:
    return "|".join(start + name for name in names.split("|"))


def inside(
    path: str, heads: str, *values: Inside, name: str = "attn", call: int = 0, needs: str | None = None
) -> dict[str, Location]:
    """What an attention module's own call to a kernel is given and gives."""
    n = f"{path}:{heads}"
    return {f"{name}.hook_{value}": Attention(path, value, n, call, needs) for value in values}


def fused_attention(path: str, *, heads: str = "num_heads", name: str = "attn") -> dict[str, Location]:
    """An nn.MultiheadAttention: projections and attention in one call."""
    return inside(path, heads, "q", "k", "v", "attn_scores", "pattern", "z", name=name)


def norm(path: str, name: str, kind: Literal["LN", "RMS"] = "LN", offset: float = 0.0) -> dict[str, Location]:
    """A LayerNorm or an RMSNorm: its scale and its result before the affine map."""
    return {
        f"{name}.hook_scale": Norm(path, "scale", kind, offset),
        f"{name}.hook_normalized": Norm(path, "normalized", kind, offset),
    }


def mlp(path: str, *, up: str = "fc1", down: str = "fc2") -> dict[str, Location]:
    """Up, activation, down."""
    return {"mlp.hook_pre": Output(f"{path}.{up}"), "mlp.hook_post": Input(f"{path}.{down}")}


def gated_mlp(
    path: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, Location]:
    """Down(act(gate) * up), as in Llama: `hook_pre` is the gate's, `hook_pre_linear` the other."""
    return {
        "mlp.hook_pre": Output(f"{path}.{gate}"),
        "mlp.hook_pre_linear": Output(f"{path}.{up}"),
        "mlp.hook_post": Input(f"{path}.{down}"),
    }


def pre_norm(
    *,
    ln1: str,
    attn: str,
    heads: Mapping[str, Location],
    ln2: str,
    ff: str,
    neurons: Mapping[str, Location],
    kind: Literal["LN", "RMS"] = "LN",
    offset: float = 0.0,
) -> dict[str, Location]:
    """A block as most are: norm, attention, norm, MLP, each branch added to the stream as it is.

    `ln1`, `attn`, `ln2`, `ff` are the four modules; `heads` and `neurons` what is inside two of them.
    """
    return (
        {"hook_resid_pre": Input("")}
        | norm(ln1, "ln1", kind, offset)
        | dict(heads)
        | {"hook_attn_out": Output(attn), "hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
        | norm(ln2, "ln2", kind, offset)
        | dict(neurons)
        | {"hook_mlp_out": Output(ff), "hook_resid_post": Output("")}
    )
