"""Flux: blocks that keep text and image apart, then blocks that do not; text first."""

from mm_adapters.families._dit import DOUBLE_END, DOUBLE_START, JOINT_ATTENTION
from mm_adapters.records import (
    Guidance,
    Input,
    Joint,
    ModelRecord,
    Output,
    Sampling,
    Stack,
    Tower,
    TowerMount,
    norm,
    register,
)

_SINGLE = {
    "hook_resid_pre": Input("", argument="hidden_states"),
    "hook_text_resid_pre": Input("", argument="encoder_hidden_states"),
    **norm("norm.norm", "ln1"),
    # The MLP stands beside the attention; both go through one last projection.
    "mlp.hook_pre": Output("proj_mlp"),
    "mlp.hook_post": Output("act_mlp"),
    **JOINT_ATTENTION,
    "hook_branch": Output("proj_out"),
    "hook_text_resid_post": Output("", item=0),
    "hook_resid_post": Output("", item=1),
}
register(
    Tower(
        "flux_transformer",
        "denoiser",
        ("diffusers:FluxTransformer2DModel",),
        {"blocks": Stack(("transformer_blocks.*",), {**DOUBLE_START, **DOUBLE_END}),
         "single_blocks": Stack(("single_transformer_blocks.*",), _SINGLE)},
        before={"hook_in": Input(""), "hook_embed": Output("x_embedder"),
                "hook_text_embed": Output("context_embedder")},
        after={"hook_out": Output("")},
        absent={"single_blocks.*.hook_resid_mid": "attention and MLP are added at once"},
        takes="hidden_states",
        gives="sample",
        pool="none",
        joint=Joint("text"),
    )
)  # fmt: skip
register(
    ModelRecord(
        "flux",
        "diffusion",
        ("diffusers:FluxPipeline", "diffusers:FluxImg2ImgPipeline", "diffusers:FluxInpaintPipeline",
         "diffusers:FluxFillPipeline", "diffusers:FluxControlPipeline"),
        {"text": TowerMount("text_encoder"), "text_2": TowerMount("text_encoder_2"),
         "denoiser": TowerMount("transformer"), "vae": TowerMount("vae")},
        loop="denoiser",
        # Two calls a step where there is a negative prompt and true_cfg_scale is above one.
        guidance=Guidance(flag=None, scale="true_cfg_scale", denoiser_calls=("cond", "uncond")),
        sampling={"denoiser": Sampling(packed=True)},
        joint_text=("text_2",),
    )
)  # fmt: skip
