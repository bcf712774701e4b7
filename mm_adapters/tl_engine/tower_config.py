"""A tower's configuration, with the names that TransformerLens' HookedTransformerConfig has."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformer_lens.config import TransformerLensConfig

from mm_adapters.records.resolve import head_count
from mm_adapters.records.spec import Attention, Input, Location, Output
from mm_adapters.records.stages import Stages
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.sites.weights import tensor_at


@dataclass
class TowerConfig(TransformerLensConfig):
    """TransformerLens' configuration of one tower. `tower` is its name, `d_vocab_out` its logits.

    What says how TransformerLens would train or process a model of its own has its default and no effect.
    """

    tower: str = ""
    model_name: str = ""
    d_vocab_out: int = -1
    original_architecture: str | None = None
    tokenizer_name: str | None = None
    tokenizer_prepends_bos: bool = True
    tokenizer_appends_eos: bool = False
    eos_token_id: int | list[int] | None = None
    n_params: int | None = None
    attention_dir: str = "causal"
    attn_scale: float = -1.0
    use_attn_scale: bool = True
    parallel_attn_mlp: bool = False
    tie_word_embeddings: bool = False
    rotary_dim: int | None = None
    rotary_base: float = 10000
    window_size: int | None = None
    output_logits_soft_cap: float = -1.0
    attn_scores_soft_cap: float = -1.0
    use_qk_norm: bool = False
    use_hook_mlp_in: bool = False
    use_attn_in: bool = False
    use_hook_tokens: bool = False
    ungroup_grouped_query_attention: bool = False
    n_devices: int = 1
    seed: int | None = None
    init_mode: str = "gpt2"
    init_weights: bool = False
    initializer_range: float = -1.0
    from_checkpoint: bool = False
    checkpoint_index: int | None = None
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    use_local_attn: bool = False
    attn_types: list[str] | None = None
    scale_attn_by_inverse_layer_idx: bool = False
    post_embedding_ln: bool = False
    use_normalization_before_and_after: bool = False
    rotary_adjacent_pairs: bool = False
    trust_remote_code: bool = False
    quantization_method: str | None = None
    load_in_4bit: bool = False
    clip_qkv: float | None = None
    use_logn_attn: bool = False
    train_seq_length: int | None = None
    decoder_start_token_id: int | None = None
    relative_attention_num_buckets: int | None = None
    relative_attention_max_distance: int | None = None
    use_attention_sinks: bool = False
    norm_topk_prob: bool = False
    # How the angles of rotary positions are scaled for long texts.
    rotary_base_local: float | None = None
    rotary_scaling_factor: float = 1.0
    use_dynamic_ntk_rope: bool = False
    use_NTK_by_parts_rope: bool = False
    NTK_by_parts_low_freq_factor: float = 1.0
    NTK_by_parts_high_freq_factor: float = 4.0
    NTK_by_parts_factor: float = 8.0
    NTK_original_ctx_len: int = 8192
    use_yarn_rope: bool = False
    yarn_factor: float = 1.0
    yarn_attention_factor: float = 1.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_truncate: bool = True
    yarn_global_attn_only: bool = False

    def watch(self, flags: Container[str], switch: Callable[[str, bool], None]) -> None:
        """Calls `switch` in place of setting one of these attributes, and it sets it.

        HookedTransformer reads them at each call, so that setting one is a way to switch its points on.
        """
        self.__dict__["_watched"] = (flags, switch)

    def __setattr__(self, name: str, value: Any) -> None:
        flags, switch = self.__dict__.get("_watched", ((), None))
        if name in flags and switch is not None:
            switch(name, bool(value))
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no tower."""
        return {name: value for name, value in self.__dict__.items() if name != "_watched"}

    def is_layer_norm_activation(self) -> bool:
        """Whether the MLP normalises its neurons (SoLU); no model here does."""
        return self.act_fn.endswith("_ln")


def tower_config(mounted: TowerView, **common: Any) -> TowerConfig:
    """The configuration of a tower, read off its modules and its library's configuration."""
    record = mounted.record
    parts = mounted.parts["blocks"][0] if mounted.parts.get("blocks") else {}
    n_layers = mounted.n_layers()
    common |= {"tower": mounted.name, "normalization_type": record.norm}
    common |= {"act_fn": _activation(mounted), "uses_rms_norm": record.norm == "RMS"}
    common["attention_dir"] = "causal" if record.causal else "bidirectional"
    weights = mounted.weights(0).names("attn") if "attn.hook_q" in parts else {}
    # Of stages of several widths and numbers of heads no one number is right.
    if isinstance(record.order, Stages) or not weights.keys() & {"W_Q", "W_O"}:
        return TowerConfig(d_model=0, d_head=0, n_heads=0, n_layers=n_layers, n_ctx=0, **common)
    first = mounted.block(0)
    n_heads, n_kv = (_heads(first, parts[f"attn.hook_{letter}"]) for letter in "qk")
    _, d_model, d_head = weights["W_Q"]().shape if "W_Q" in weights else weights["W_O"]().mT.shape
    vocabulary = tensor_at(mounted.module, record.embed) if record.embed else None
    d_vocab = -1 if vocabulary is None else vocabulary.shape[0]
    gated = "mlp.hook_pre_linear" in parts
    has_mlp = "mlp.hook_post" in parts
    d_mlp = mounted.weights(0).names("mlp")["W_out"]().shape[0] if has_mlp else None
    of_mlp = d_model * d_mlp * (2 + gated) if d_mlp else 0
    norm, settings = mounted.final_norm, getattr(mounted.module, "config", None)
    rotary = _rotary(settings, d_head) if "attn.hook_rot_q" in parts else {}
    return TowerConfig(
        d_model=d_model,
        d_head=d_head,
        n_heads=n_heads,
        n_key_value_heads=n_kv if n_kv != n_heads else None,
        n_layers=n_layers,
        n_ctx=mounted.context_length or 0,
        d_mlp=d_mlp,
        d_vocab=d_vocab,
        d_vocab_out=d_vocab if record.role == "language" else -1,
        n_params=n_layers * (4 * d_model * d_head * n_heads + of_mlp),
        gated_mlp=gated,
        final_rms=norm is not None and norm.kind == "RMS",
        attn_only=not has_mlp,
        attn_scale=_attention_scale(first, parts, d_head),
        positional_embedding_type="rotary" if rotary else "standard",
        eps=_eps(None if norm is None else norm.module),
        window_size=getattr(settings, "sliding_window", None),
        output_logits_soft_cap=getattr(settings, "final_logit_softcapping", None) or -1.0,
        attn_scores_soft_cap=getattr(settings, "attn_logit_softcapping", None) or -1.0,
        tie_word_embeddings=bool(getattr(settings, "tie_word_embeddings", False)),
        **rotary,
        **common,
    )


def _heads(block: nn.Module, location: Location) -> int:
    assert isinstance(location, Output | Input | Attention)
    assert location.heads is not None
    return head_count(block, location.heads)


# By transformers' kind of scaling: TransformerLens' switch, and its names for that kind's numbers.
_SCALINGS: dict[str, tuple[str | None, dict[str, str]]] = {
    "linear": (None, {"rotary_scaling_factor": "factor"}),
    "dynamic": ("use_dynamic_ntk_rope", {"rotary_scaling_factor": "factor"}),
    "llama3": (
        "use_NTK_by_parts_rope",
        {
            "NTK_by_parts_factor": "factor",
            "NTK_by_parts_low_freq_factor": "low_freq_factor",
            "NTK_by_parts_high_freq_factor": "high_freq_factor",
            "NTK_original_ctx_len": "original_max_position_embeddings",
        },
    ),
    "yarn": (
        "use_yarn_rope",
        {
            "yarn_factor": "factor",
            "yarn_attention_factor": "attention_factor",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
            "yarn_truncate": "truncate",
            "yarn_original_max_position_embeddings": "original_max_position_embeddings",
        },
    ),
}


def _rotary(settings: Any, d_head: int) -> dict[str, Any]:
    named = getattr(settings, "rope_parameters", None)
    named = named if isinstance(named, dict) else {}
    more: dict[str, Any] = {}
    if isinstance(named.get("full_attention"), dict):  # Layers of two kinds.
        more["rotary_base_local"] = (named.get("sliding_attention") or {}).get("rope_theta")
        named = named["full_attention"]
    switch, names = _SCALINGS.get(str(named.get("rope_type")), (None, {}))
    more |= {ours: named[theirs] for ours, theirs in names.items() if named.get(theirs) is not None}
    if switch is not None:
        more[switch] = True
    base = named.get("rope_theta") or getattr(settings, "rope_theta", None) or 10000
    share = named.get("partial_rotary_factor") or getattr(settings, "partial_rotary_factor", None) or 1.0
    return {"rotary_base": base, "rotary_dim": int(d_head * share), **more}


def _attention_scale(block: nn.Module, parts: dict[str, Location], d_head: int) -> float:
    """What the scores are divided by."""
    location = parts.get("attn.pattern") or parts.get("attn.hook_pattern")
    module = block.get_submodule(location.path) if isinstance(location, Attention) else None
    factor = next(
        (f for name in ("scaling", "scale") if isinstance(f := getattr(module, name, None), float) and f),
        None,
    )
    return math.sqrt(d_head) if factor is None else 1 / factor


# What libraries' configurations call it.
_NAMES = ("hidden_act", "activation_function", "hidden_activation", "dense_act_fn")
_MODULES = {"GELU": "gelu", "QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu", "Tanh": "tanh"}


def _activation(mounted: TowerView) -> str:
    """Its activation function as its library names it ("silu", "quick_gelu", ...)."""
    settings = getattr(mounted.module, "config", None)
    for name in _NAMES:
        if isinstance(value := getattr(settings, name, None), str):
            return value
    inside = mounted.block(0).modules() if mounted.n_layers() else ()
    return next((name for m in inside if (name := _MODULES.get(type(m).__name__))), "")


def _eps(norm: nn.Module | None) -> float:
    return next((e for n in ("eps", "variance_epsilon") if (e := getattr(norm, n, None)) is not None), 1e-5)
