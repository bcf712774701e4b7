"""UNets without text: DDPM, DDIM and what else samples with UNet2DModel (arXiv 2006.11239)."""

from mm_adapters.families._unet import MAP_ATTENTION, RESNETS
from mm_adapters.records import Input, ModelRecord, Output, Tower, TowerMount, register

register(
    Tower(
        "unet2d",
        "denoiser",
        ("diffusers:UNet2DModel",),
        {"resnets": RESNETS, "attentions": MAP_ATTENTION},
        before={"hook_in": Input("", is_map=True), "hook_embed": Output("conv_in", is_map=True)},
        after={"hook_mid_block": Output("mid_block", is_map=True), "hook_out": Output("", is_map=True)},
        takes="sample",
        gives="sample",
        pool="none",
    )
)
_PIPELINES = ("diffusers:DDPMPipeline", "diffusers:DDIMPipeline")
register(
    ModelRecord("unconditional", "diffusion", _PIPELINES, {"denoiser": TowerMount("unet")}, loop="denoiser")
)
