"""Decoder-only language towers that name their parts as Llama does."""

from mm_adapters._registry import register
from mm_adapters._spec import Input, Mount, Mounts, Stack, Tower
from mm_adapters.families._parts import attention, gated_mlp, norm, pre_norm

ATTENTION = attention("self_attn", o="o_proj", heads="config.num_attention_heads",
                      kv_heads="config.num_key_value_heads", rotary=True)  # fmt: skip
BLOCKS = Stack(
    ("layers.*",),
    pre_norm(ln1="input_layernorm", attn="self_attn", heads=ATTENTION,
             ln2="post_attention_layernorm", ff="mlp", neurons=gated_mlp("mlp"), kind="RMS"),
)  # fmt: skip

register(
    Tower(
        "llama",
        "language",
        tuple(f"transformers:{c}" for c in (
            "LlamaModel", "Qwen2Model", "Qwen3Model", "MistralModel", "Emu3TextModel",
            "Qwen2VLTextModel", "Qwen2_5_VLTextModel", "Qwen3VLTextModel",
        )),
        {"blocks": BLOCKS},
        # The layers' input: a composite model embeds words and images itself.
        before={"hook_embed": Input("layers.0")},
        after=norm("norm", "ln_final", "RMS"),
        norm="RMS",
        takes="input_ids",
        gives="last_hidden_state",
        pool="each",
        embed="embed_tokens.weight",
        causal=True,
    )
)  # fmt: skip
register(
    Mounts(
        "llama_lm",
        "tower",
        tuple(f"transformers:{c}ForCausalLM" for c in ("Llama", "Qwen2", "Qwen3", "Mistral")),
        {"language": Mount("model", run="", gives="logits", project="lm_head.weight.T")},
    )
)
