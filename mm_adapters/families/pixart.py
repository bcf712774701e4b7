"""PixArt-alpha and -sigma: a diffusion transformer that reads text by cross-attention
(arXiv 2310.00426, 2403.04692)."""

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
    mlp,
    norm,
    register,
)

_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "heads": "heads"}
register(
    Tower(
        "pixart_transformer",
        "denoiser",
        ("diffusers:PixArtTransformer2DModel",),
        {
            "blocks": Stack(
                ("transformer_blocks.*",),
                {"hook_resid_pre": Input("")}
                | norm("norm1", "ln1")
                | attention("attn1", **_NAMES)
                | {"hook_attn_out": Output("attn1"), "hook_resid_mid": Stream("attn2")}
                | attention("attn2", **_NAMES, name="cross_attn")
                | {"hook_cross_attn_out": Output("attn2")}
                | {"hook_resid_mid_cross": Residual("hook_resid_mid", "hook_cross_attn_out")}
                # norm2 stands before the MLP here.
                | norm("norm2", "ln3")
                | mlp("ff", up="net.0.proj", down="net.2")
                | {"hook_mlp_out": Output("ff"), "hook_resid_post": Output("")},
            )
        },
        before={"hook_in": Input("", is_map=True), "hook_embed": Output("pos_embed"),
                "hook_text_embed": Output("caption_projection")},
        after={"hook_out": Output("", is_map=True)},
        takes="hidden_states",
        gives="sample",
        pool="none",
    )
)  # fmt: skip
register(
    ModelRecord(
        "pixart",
        "diffusion",
        ("diffusers:PixArtAlphaPipeline", "diffusers:PixArtSigmaPipeline"),
        {"text": TowerMount("text_encoder"), "denoiser": TowerMount("transformer"), "vae": TowerMount("vae")},
        loop="denoiser",
        guidance=Guidance(flag=None),
        sampling={"denoiser": Sampling(variance="wide")},
    )
)
