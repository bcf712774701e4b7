"""unCLIP: a prior makes an image's embedding of the text, a decoder the image of both (arXiv 2204.06125);
and Stable unCLIP, where Stable Diffusion's UNet is the decoder."""

from dataclasses import replace

from mm_adapters.families.prior import PRIOR
from mm_adapters.families.stable_diffusion import TOWERS
from mm_adapters.records import Guidance, ModelRecord, Output, Sampling, Tower, TowerMount, register

register(
    Tower(
        "unclip_text_projection",
        "projector",
        ("diffusers:UnCLIPTextProjModel",),
        {},
        before={
            # The image's embedding becomes a few words before the text's.
            "hook_image_words": Output("clip_extra_context_tokens_proj", axes=("batch", "d_words")),
            "hook_text_words": Output("text_encoder_hidden_states_norm"),
        },
        after={"hook_out": Output("", item=0), "hook_time": Output("", item=1, axes=("batch", "d_time"))},
        norm=None,
        takes="",
        gives="",
        pool="none",
    )
)
# One scale above one makes both loops run with unconditional rows.
_BOTH = Guidance(flag=None, scale="decoder_guidance_scale|prior_guidance_scale")
_OF_PRIOR = replace(_BOTH, scale="prior_guidance_scale|decoder_guidance_scale")
register(
    ModelRecord(
        "unclip",
        "diffusion",
        ("diffusers:UnCLIPPipeline",),
        {
            "text": TowerMount("text_encoder"),
            "prior": TowerMount("prior"),
            "projector": TowerMount("text_proj"),
            "denoiser": TowerMount("decoder"),
            "enlarger": TowerMount("super_res_first"),
            "last_enlarger": TowerMount("super_res_last"),
        },
        loop="denoiser",
        guidance=_BOTH,
        more_loops={"prior": _OF_PRIOR, "projector": _BOTH, "enlarger": None, "last_enlarger": None},
        sampling={
            "prior": PRIOR,
            "denoiser": Sampling(
                variance="always", scheduler="decoder_scheduler", steps="decoder_num_inference_steps"
            ),
        },
    )
)
register(
    ModelRecord(
        "stable_unclip",
        "diffusion",
        ("diffusers:StableUnCLIPPipeline",),
        {
            "text_prior": TowerMount("prior_text_encoder"),
            "prior": TowerMount("prior"),
            "text": TowerMount("text_encoder"),
            "denoiser": TowerMount("unet"),
            "vae": TowerMount("vae"),
        },
        loop="denoiser",
        guidance=Guidance(flag=None),
        more_loops={"prior": Guidance(flag=None, scale="prior_guidance_scale")},
        sampling={"prior": PRIOR},
    )
)
register(
    ModelRecord(
        "stable_unclip_image",
        "diffusion",
        ("diffusers:StableUnCLIPImg2ImgPipeline",),
        TOWERS,
        loop="denoiser",
        guidance=Guidance(flag=None),
    )
)
