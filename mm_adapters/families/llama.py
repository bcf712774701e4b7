"""Decoder-only language towers that name their parts as Llama does."""

from mm_adapters._registry import register
from mm_adapters._spec import Input, Output, Residual, Stack, Tower
from mm_adapters.families._parts import attention, gated_mlp, norm

BLOCKS = Stack(
    ("layers.*",),
    {"hook_resid_pre": Input("")}
    | norm("input_layernorm", "ln1", "RMS")
    | attention("self_attn", o="o_proj", heads="config.num_attention_heads",
                kv_heads="config.num_key_value_heads", rotary=True)
    | {"hook_attn_out": Output("self_attn")}
    | {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
    | norm("post_attention_layernorm", "ln2", "RMS")
    | gated_mlp("mlp", gate="gate_proj", up="up_proj", down="down_proj")
    | {"hook_mlp_out": Output("mlp"), "hook_resid_post": Output("")},
)  # fmt: skip

register(
    Tower(
        "llama",
        "language",
        ("transformers:LlamaModel", "transformers:Qwen2Model", "transformers:MistralModel"),
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
)
