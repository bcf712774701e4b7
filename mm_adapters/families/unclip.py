"""unCLIP: a prior makes an image's embedding of the text, a decoder the image of both (arXiv 2204.06125);
and Stable unCLIP, where Stable Diffusion's UNet is the decoder."""

from mm_adapters._registry import register
from mm_adapters._spec import Guidance, Mount, Mounts, Output, Tower
from mm_adapters.families.stable_diffusion import TOWERS

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
_BOTH = Guidance(flag=None, scale="prior_guidance_scale|decoder_guidance_scale")
register(
    Mounts(
        "unclip",
        "diffusion",
        ("diffusers:UnCLIPPipeline",),
        {"text": Mount("text_encoder"), "prior": Mount("prior"), "projector": Mount("text_proj"),
         "denoiser": Mount("decoder"), "enlarger": Mount("super_res_first"),
         "last_enlarger": Mount("super_res_last")},
        loop="denoiser",
        guidance=_BOTH,
        more_loops={"prior": _BOTH, "projector": _BOTH, "enlarger": None, "last_enlarger": None},
    )
)  # fmt: skip
register(
    Mounts(
        "stable_unclip",
        "diffusion",
        ("diffusers:StableUnCLIPPipeline",),
        {
            "text_prior": Mount("prior_text_encoder"),
            "prior": Mount("prior"),
            "text": Mount("text_encoder"),
            "denoiser": Mount("unet"),
            "vae": Mount("vae"),
        },
        loop="denoiser",
        guidance=Guidance(flag=None),
        more_loops={"prior": Guidance(flag=None, scale="prior_guidance_scale")},
    )
)
register(
    Mounts(
        "stable_unclip_image",
        "diffusion",
        ("diffusers:StableUnCLIPImg2ImgPipeline",),
        TOWERS,
        loop="denoiser",
        guidance=Guidance(flag=None),
    )
)  # fmt: skip
