"""timm's Eva: EVA, EVA-02 and EVA-CLIP's image tower (arXiv 2303.11331, 2303.15389)."""

from mm_adapters.families.timm_vit import POOL
from mm_adapters.records import (
    Built,
    Input,
    ModelRecord,
    Output,
    Stack,
    Stream,
    Tower,
    TowerMount,
    inside,
    norm,
    register,
)

_N = "attn:num_heads"
register(
    Tower(
        "timm_eva",
        "vision",
        ("timm:Eva",),
        {
            "blocks": Stack(
                ("blocks.*",),
                {"hook_resid_pre": Input("")}
                | norm("norm1", "ln1")
                | {site: (Output(f"attn.{site[-1]}_proj", _N), fused)
                   for site, fused in inside("attn", "num_heads", "q", "k", "v").items()}
                | inside("attn", "num_heads", "rot_q", "rot_k", "attn_scores", "pattern")
                | {"attn.hook_z": Input("attn.proj", _N), "hook_attn_out": Output("attn")}
                | {"hook_resid_mid": Stream("norm2")}
                | norm("norm2", "ln2")
                | {"mlp.hook_pre": Output("mlp.fc1_g|mlp.fc1")}
                | {"mlp.hook_pre_linear": Output("mlp.fc1_x"), "mlp.hook_post": Input("mlp.fc2")}
                | {"hook_mlp_out": Output("mlp"), "hook_resid_post": Output("")},
            )
        },
        before={"hook_embed": Output("norm_pre")},
        after=norm("norm", "ln_final") | norm("fc_norm", "ln_pooled"),
        absent={
            "ln_final.*": "what was pooled is normalised: ln_pooled",
            "pool.*": "the attention that pools is not read by parts",
        },
        takes="x",
        calls="patch_embed",  # Its wrappers call its methods, and not it.
        gives="",
        pool=POOL,
        position="pos_embed",
        patch="patch_embed.proj",
        n_class=Built((("cls_token", True, 1),), 0),
    )
)  # fmt: skip
# By itself it may end in a classifier; what wraps it leaves that out.
register(ModelRecord("timm_eva", "tower", ("timm:Eva",), {"vision": TowerMount("", project="head.weight.T")}))
