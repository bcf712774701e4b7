"""Decoder-only language towers that name their parts as Llama does."""

from mm_adapters.families._parts import decoder
from mm_adapters.records import ModelRecord, Stack, TowerMount, attention, gated_mlp, pre_norm, register

ATTENTION = attention("self_attn", o="o_proj", heads="config.num_attention_heads",
                      kv_heads="config.num_key_value_heads", rotary=True)  # fmt: skip
BLOCKS = Stack(
    ("layers.*",),
    pre_norm(ln1="input_layernorm", attn="self_attn", heads=ATTENTION,
             ln2="post_attention_layernorm", ff="mlp", neurons=gated_mlp("mlp"), kind="RMS"),
)  # fmt: skip

register(
    decoder("llama", "LlamaModel", "Qwen2Model", "Qwen3Model", "MistralModel", "Emu3TextModel",
            "Qwen2VLTextModel", "Qwen2_5_VLTextModel", "Qwen3VLTextModel", blocks=BLOCKS)
)  # fmt: skip
register(
    ModelRecord(
        "llama_lm",
        "tower",
        tuple(f"transformers:{c}ForCausalLM" for c in ("Llama", "Qwen2", "Qwen3", "Mistral")),
        {"language": TowerMount("model", run="", gives="logits", project="lm_head.weight.T")},
    )
)
