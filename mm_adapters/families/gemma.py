"""Gemma's language towers, whose norms store their gains less one (arXiv 2403.08295, 2503.19786)."""

from mm_adapters.families._parts import decoder
from mm_adapters.families.llama import ATTENTION
from mm_adapters.records import Input, Output, Residual, Stack, gated_mlp, norm, pre_norm, register

MLP = gated_mlp("mlp")
BLOCKS = Stack(
    ("layers.*",),
    pre_norm(ln1="input_layernorm", attn="self_attn", heads=ATTENTION,
             ln2="post_attention_layernorm", ff="mlp", neurons=MLP, kind="RMS", offset=1.0),
)  # fmt: skip
# Later ones normalise what a branch gives, too, before it joins the stream.
BLOCKS_3 = Stack(
    ("layers.*",),
    {"hook_resid_pre": Input("")}
    | norm("input_layernorm", "ln1", "RMS", 1.0)
    | ATTENTION
    | norm("post_attention_layernorm", "ln1_post", "RMS", 1.0)
    | {"hook_attn_out": Output("post_attention_layernorm")}
    | {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
    | norm("pre_feedforward_layernorm", "ln2", "RMS", 1.0)
    | MLP
    | norm("post_feedforward_layernorm", "ln2_post", "RMS", 1.0)
    | {"hook_mlp_out": Output("post_feedforward_layernorm"), "hook_resid_post": Output("")},
)

register(decoder("gemma", "GemmaModel", blocks=BLOCKS, offset=1.0))
register(decoder("gemma3_text", "Gemma2Model", "Gemma3TextModel", blocks=BLOCKS_3, offset=1.0))
