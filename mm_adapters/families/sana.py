"""Sana: linear attention within the image, softmax attention onto the text (arXiv 2410.10629)."""

# pyright: reportArgumentType=false

from mm_adapters.records import (
    Guidance,
    Input,
    ModelRecord,
    Output,
    Residual,
    Sampling,
    Stack,
    Stream,
    Tower,
    TowerMount,
    attention,
    norm,
    register,
)

_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "heads": "heads"}
_LINEAR = {site: location for site, location in attention("attn1", **_NAMES).items()
           if not site.endswith(("hook_attn_scores", "hook_pattern"))}  # fmt: skip
_WHY = "linear attention: keys and values are summed first, no position's weight on another is formed"
register(
    Tower(
        "sana_transformer",
        "denoiser",
        ("diffusers:SanaTransformer2DModel",),
        {
            "blocks": Stack(
                ("transformer_blocks.*",),
                {"hook_resid_pre": Input("")}
                | norm("norm1", "ln1")
                | _LINEAR
                | {"hook_attn_out": Output("attn1"), "hook_resid_mid": Stream("attn2")}
                | attention("attn2", **_NAMES, name="cross_attn")
                | {"hook_cross_attn_out": Output("attn2")}
                | {"hook_resid_mid_cross": Residual("hook_resid_mid", "hook_cross_attn_out")}
                | norm("norm2", "ln3")
                # The MLP is of convolutions, over the grid.
                | {"mlp.hook_conv_pre": Output("ff.conv_inverted", is_map=True)}
                | {"mlp.hook_conv_post": Input("ff.conv_point", is_map=True)}
                | {"hook_mlp_map": Output("ff", is_map=True), "hook_resid_post": Output("")},
            )
        },
        before={"hook_in": Input("", is_map=True), "hook_embed": Output("patch_embed"),
                "hook_text_embed": Output("caption_norm")},
        after={"hook_out": Output("", is_map=True)},
        absent={"blocks.*.attn.hook_pattern": _WHY, "blocks.*.attn.hook_attn_scores": _WHY},
        takes="hidden_states",
        gives="sample",
        pool="none",
    )
)  # fmt: skip
register(
    ModelRecord(
        "sana",
        "diffusion",
        ("diffusers:SanaPipeline",),
        {"denoiser": TowerMount("transformer"), "vae": TowerMount("vae")},
        loop="denoiser",
        guidance=Guidance(),
        sampling={"denoiser": Sampling(variance="wide")},
    )
)
