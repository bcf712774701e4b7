"""OPT's language tower (arXiv 2205.01068)."""

from dataclasses import replace

from mm_adapters.families._parts import decoder
from mm_adapters.records import Input, ModelRecord, Output, Stack, TowerMount, attention, pre_norm, register

NEURONS = {"mlp.hook_pre": Output("fc1"), "mlp.hook_post": Input("fc2")}
BLOCKS = Stack(
    ("layers.*",),
    pre_norm(ln1="self_attn_layer_norm", attn="self_attn", heads=attention("self_attn"),
             ln2="final_layer_norm", ff="fc2", neurons=NEURONS),
    folded=("final_layer_norm", "fc1", "fc2"),
)  # fmt: skip

OPT = register(
    decoder("opt", "OPTDecoder", blocks=BLOCKS, final="final_layer_norm", kind="LN",
            position="embed_positions.weight")
)  # fmt: skip
# By itself it embeds its words; a composite model gives it words and images, embedded.
register(
    replace(
        OPT,
        name="opt_alone",
        classes=(),
        before={
            "hook_embed": Output("project_in|embed_tokens"),
            "hook_pos_embed": Output("embed_positions", reference_site="hook_embed"),
        },
    )
)
register(
    ModelRecord(
        "opt_lm",
        "tower",
        ("transformers:OPTForCausalLM",),
        {
            "language": TowerMount(
                "model.decoder", "opt_alone", run="", gives="logits", project="lm_head.weight.T"
            )
        },
    )
)
