"""DiT: a diffusion transformer conditioned on a class (arXiv 2212.09748)."""

from mm_adapters.records import (
    Guidance,
    Input,
    ModelRecord,
    Output,
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

register(
    Tower(
        "dit_transformer",
        "denoiser",
        ("diffusers:DiTTransformer2DModel",),
        {
            "blocks": Stack(
                ("transformer_blocks.*",),
                {"hook_resid_pre": Input("")}
                | norm("norm1.norm", "ln1")
                | attention("attn1", q="to_q", k="to_k", v="to_v", o="to_out.0", heads="heads")
                | {"hook_attn_out": Output("attn1"), "hook_resid_mid": Stream("norm3")}
                | norm("norm3", "ln2")
                | mlp("ff", up="net.0.proj", down="net.2")
                | {"hook_mlp_out": Output("ff"), "hook_resid_post": Output("")},
            )
        },
        before={"hook_in": Input("", is_map=True), "hook_embed": Output("pos_embed")},
        after={"hook_out": Output("", is_map=True)},
        absent={"blocks.*.cross_attn.*": "it reads no text: a class enters through the norms"},
        takes="hidden_states",
        gives="sample",
        pool="none",
    )
)
register(
    ModelRecord(
        "dit",
        "diffusion",
        ("diffusers:DiTPipeline",),
        {"denoiser": TowerMount("transformer"), "vae": TowerMount("vae")},
        loop="denoiser",
        # It lays the classes first, then the class of none.
        guidance=Guidance(flag=None, denoiser_rows=("cond", "uncond")),
        sampling={"denoiser": Sampling(variance="wide")},
    )
)
