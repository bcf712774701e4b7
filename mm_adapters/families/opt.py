"""OPT's language tower (arXiv 2205.01068)."""

from mm_adapters._registry import register
from mm_adapters._spec import Input, Mount, Mounts, Output, Stack, Tower
from mm_adapters.families._parts import attention, norm, pre_norm

NEURONS = {"mlp.hook_pre": Output("fc1"), "mlp.hook_post": Input("fc2")}
BLOCKS = Stack(
    ("layers.*",),
    pre_norm(ln1="self_attn_layer_norm", attn="self_attn", heads=attention("self_attn"),
             ln2="final_layer_norm", ff="fc2", neurons=NEURONS),
    folded=("final_layer_norm", "fc1", "fc2"),
)  # fmt: skip

register(
    Tower(
        "opt",
        "language",
        ("transformers:OPTDecoder",),
        {"blocks": BLOCKS},
        before={"hook_embed": Input("layers.0")},
        after=norm("final_layer_norm", "ln_final"),
        takes="input_ids",
        gives="last_hidden_state",
        pool="each",
        embed="embed_tokens.weight",
        position="embed_positions.weight",
        causal=True,
    )
)
register(
    Mounts(
        "opt_lm",
        "tower",
        ("transformers:OPTForCausalLM",),
        {"language": Mount("model.decoder", run="", gives="logits", project="lm_head.weight.T")},
    )
)
