"""The prior of unCLIP and Kandinsky: a transformer that denoises an image's embedding (arXiv 2204.06125)."""

from dataclasses import replace

from mm_adapters.records import (
    Guidance,
    Input,
    ModelRecord,
    Output,
    Residual,
    Sampling,
    Stack,
    Tower,
    TowerMount,
    attention,
    mlp,
    norm,
    register,
)

# Of the loop that makes an embedding, in this pipeline and as the first of others.
OWN_PRIOR = Sampling(prediction="hook_pooled", pictures=False)
PRIOR = replace(OWN_PRIOR, scheduler="prior_scheduler", steps="prior_num_inference_steps")
register(
    Tower(
        "prior_transformer",
        "denoiser",
        ("diffusers:PriorTransformer",),
        {
            "blocks": Stack(
                ("transformer_blocks.*",),
                {"hook_resid_pre": Input("")}
                | norm("norm1", "ln1")
                | attention("attn1", q="to_q", k="to_k", v="to_v", o="to_out.0", heads="heads")
                | {"hook_attn_out": Output("attn1")}
                | {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
                | norm("norm3", "ln2")
                | mlp("ff", up="net.0.proj", down="net.2")
                | {"hook_mlp_out": Output("ff"), "hook_resid_post": Output("")},
            )
        },
        before={"hook_in": Input("", argument="hidden_states", axes=("batch", "d_embedding"))},
        after=norm("norm_out", "ln_final") | {"hook_pooled": Output("")},
        takes="hidden_states",
        gives="predicted_image_embedding",
        pool="last",
    )
)
register(
    ModelRecord(
        "kandinsky_prior",
        "diffusion",
        ("diffusers:KandinskyV22PriorPipeline", "diffusers:KandinskyPriorPipeline"),
        {"text": TowerMount("text_encoder"), "denoiser": TowerMount("prior")},
        loop="denoiser",
        guidance=Guidance(flag=None),
        sampling={"denoiser": OWN_PRIOR},
    )
)
