"""Tiny denoisers and pipelines beside Stable Diffusion 1, 2 and XL: one builder per family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as df
import torch
import transformers as hf
from PIL import Image
from tiny import _TEXT, _UNET, _VAE, Case, letter_tokenizer, seeded
from tiny_vlm import qwen2_5_vl
from torch import Tensor

_DIRTY = {"clean_caption": False}  # Cleaning needs a parser of HTML.
_PROMPTS = {"prompt": ["a cat", "a dog"], "num_inference_steps": 2, "seed": 0, "output_type": "pt"}
_MAP_UNET = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
    "attention_head_dim": 8,
}  # fmt: skip
_SIMPLE = _MAP_UNET | {
    "in_channels": 3,
    "out_channels": 6,
    "encoder_hid_dim": 24,
    "cross_attention_dim": 24,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
}


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def t5() -> Any:
    config = hf.T5Config(
        vocab_size=60,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
    )
    return seeded(lambda: hf.T5EncoderModel(config))


def clip_text(projected: bool = False, **more: Any) -> Any:
    config = hf.CLIPTextConfig(**_TEXT | {"bos_token_id": 52, "eos_token_id": 53} | more)
    return seeded(lambda: (hf.CLIPTextModelWithProjection if projected else hf.CLIPTextModel)(config))


def vae(**more: Any) -> Any:
    return seeded(lambda: df.AutoencoderKL(**_VAE | more))


# What a pipeline without an autoencoder gives as it is.
_PIXELS = {"output_type": "pt"}


def quiet(pipe: Any, inputs: dict[str, Any], *off_path: str, head: Any = None, **more: Any) -> Case:
    pipe.set_progress_bar_config(disable=True)
    return Case(pipe, inputs, head or (lambda o: o.images), off_path, **more)


def t5_encoder() -> Case:
    ids = torch.randint(3, 57, (2, 6), generator=torch.Generator().manual_seed(2))
    return Case(t5(), {"input_ids": ids}, lambda o: o.last_hidden_state[..., :5])


# -- joint attention -----------------------------------------------------------------------------

_SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "attention_head_dim": 8, "num_attention_heads": 3, "joint_attention_dim": 24,
    "caption_projection_dim": 24, "pooled_projection_dim": 32, "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}  # fmt: skip
_FLUX = {
    "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 24,
    "axes_dims_rope": (4, 4, 8), "guidance_embeds": False,
}  # fmt: skip


# What the last block gives of the text is dropped.
_LAST_TEXT = ("denoiser.single_blocks.0.hook_text_resid_post",)


def sd3_transformer() -> Case:
    model = seeded(lambda: df.SD3Transformer2DModel(**_SD3, dual_attention_layers=(0,)))
    inputs = {
        "hidden_states": noise(2, 4, 8, 8),
        "encoder_hidden_states": noise(2, 5, 24),
        "pooled_projections": noise(2, 32),
        "timestep": torch.tensor([10, 10]),
    }
    return Case(model, inputs, lambda o: o.sample)


def stable_diffusion_3() -> Case:
    pipe = df.StableDiffusion3Pipeline(
        transformer=seeded(lambda: df.SD3Transformer2DModel(**_SD3 | {"sample_size": 4})),
        scheduler=df.FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(True, hidden_size=12, num_attention_heads=2),
        tokenizer=letter_tokenizer(16),
        text_encoder_2=clip_text(True, hidden_size=12, num_attention_heads=2),
        tokenizer_2=letter_tokenizer(16),
        text_encoder_3=t5(),
        tokenizer_3=letter_tokenizer(16),
    )
    # Of CLIP the layer before the last is read, and what the last gives, pooled.
    return quiet(pipe, _PROMPTS | {"height": 8, "width": 8, "max_sequence_length": 6})


def flux_transformer() -> Case:
    model = seeded(lambda: df.FluxTransformer2DModel(**_FLUX))
    inputs = {
        "hidden_states": noise(2, 6, 16),
        "encoder_hidden_states": noise(2, 5, 24),
        "pooled_projections": noise(2, 24),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.tensor([[0.0, r, c] for r in range(2) for c in range(3)]),
        "txt_ids": torch.zeros(5, 3),
    }
    return Case(model, inputs, lambda o: o.sample, _LAST_TEXT)


def flux() -> Case:
    pipe = df.FluxPipeline(
        transformer=seeded(lambda: df.FluxTransformer2DModel(**_FLUX)),
        scheduler=df.FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.0, scaling_factor=1.0, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(),
        tokenizer=letter_tokenizer(16),
        text_encoder_2=t5(),
        tokenizer_2=letter_tokenizer(16),
    )
    sizes = {"height": 8, "width": 12, "max_sequence_length": 6}
    guided = {"negative_prompt": ["b", "c"], "true_cfg_scale": 2.0}
    return quiet(pipe, _PROMPTS | sizes | guided, *_LAST_TEXT)


_QWEN = {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def qwen_image() -> Case:
    text = qwen2_5_vl().model
    frames = {
        "base_dim": 4, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False],
        "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
    }  # fmt: skip
    pipe = df.QwenImagePipeline(
        transformer=seeded(lambda: df.QwenImageTransformer2DModel(**_QWEN)),
        scheduler=df.FlowMatchEulerDiscreteScheduler(),
        vae=seeded(lambda: df.AutoencoderKLQwenImage(**frames)),
        text_encoder=text,
        tokenizer=letter_tokenizer(64),
    )
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "draw {} now", 5
    guided = {"negative_prompt": ["a rat", "a cow"], "true_cfg_scale": 2.0}
    last = (
        f"denoiser.blocks.1.{part}"
        for part in (
            "hook_text_attn_out",
            "hook_text_resid_mid",
            "text_ln2.*",
            "text_mlp.*",
            "hook_text_mlp_out",
            "hook_text_resid_post",
        )
    )
    return quiet(pipe, _PROMPTS | {"height": 8, "width": 12} | guided, *last)


# -- transformers that read text by cross-attention, or read none ----------------------------------

_DIT = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 3,
}  # fmt: skip


def pixart() -> Case:
    transformer = df.PixArtTransformer2DModel(
        **_DIT | {"sample_size": 4},
        out_channels=8,
        cross_attention_dim=24,
        caption_channels=24,
        use_additional_conditions=False,
    )
    pipe = df.PixArtAlphaPipeline(
        tokenizer=letter_tokenizer(16),
        text_encoder=t5(),
        vae=vae(),
        transformer=seeded(lambda: transformer),
        scheduler=df.DDIMScheduler(),
    )
    sizes = {"height": 8, "width": 8, "max_sequence_length": 6, "use_resolution_binning": False}
    return quiet(pipe, _PROMPTS | sizes | _DIRTY)


def dit() -> Case:
    transformer = seeded(lambda: df.DiTTransformer2DModel(**_DIT, out_channels=8, num_embeds_ada_norm=1000))
    pipe = df.DiTPipeline(transformer=transformer, vae=vae(), scheduler=df.DDIMScheduler())
    inputs = {"class_labels": [1, 2], "num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    return quiet(pipe, inputs, smooth=None)


def sana_transformer() -> Case:
    model = seeded(
        lambda: df.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=3,
            attention_head_dim=8,
            num_cross_attention_heads=3,
            cross_attention_head_dim=8,
            cross_attention_dim=24,
            caption_channels=24,
            sample_size=4,
            patch_size=1,
            mlp_ratio=2.0,
        )
    )
    inputs = {
        "hidden_states": noise(2, 4, 4, 4),
        "encoder_hidden_states": noise(2, 5, 24),
        "timestep": torch.tensor([10, 10]),
    }
    return Case(model, inputs, lambda o: o.sample)


def sana() -> Case:
    autoencoder = df.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )
    pipe = df.SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=seeded(lambda: autoencoder),
        transformer=sana_transformer().model,
        scheduler=df.FlowMatchEulerDiscreteScheduler(),
    )
    embeds = {
        "prompt_embeds": noise(2, 5, 24), "prompt_attention_mask": torch.ones(2, 5, dtype=torch.long),
        "negative_prompt_embeds": noise(2, 5, 24, seed=4), "height": 32, "width": 32,
        "negative_prompt_attention_mask": torch.ones(2, 5, dtype=torch.long),
        "use_resolution_binning": False, "negative_prompt": None,
    }  # fmt: skip
    rest = {k: v for k, v in _PROMPTS.items() if k != "prompt"}
    return quiet(pipe, rest | embeds)


# -- UNets that attend on a map --------------------------------------------------------------------


def unconditional() -> Case:
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    unet = seeded(lambda: df.UNet2DModel(**_MAP_UNET, **blocks))
    pipe = df.DDIMPipeline(unet=unet, scheduler=df.DDIMScheduler())
    inputs = {"batch_size": 2, "num_inference_steps": 2, "seed": 0, "output_type": "np"}
    return quiet(pipe, inputs, head=lambda o: torch.as_tensor(o.images), smooth=None)


def unet2d() -> Case:
    inputs = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(10)}
    return Case(unconditional().model.unet, inputs, lambda o: o.sample)


def _if_parts() -> dict[str, Any]:
    return {
        "tokenizer": letter_tokenizer(16),
        "text_encoder": t5(),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }


def deepfloyd_if() -> Case:
    unet = seeded(lambda: df.UNet2DConditionModel(**_SIMPLE))
    pipe = df.IFPipeline(**_if_parts(), unet=unet, scheduler=df.DDPMScheduler(clip_sample=False))
    return quiet(pipe, _PROMPTS | _DIRTY | {"height": 8, "width": 8}, smooth=_PIXELS)


def deepfloyd_if_second_stage() -> Case:
    options = _SIMPLE | {"in_channels": 6, "class_embed_type": "timestep"}
    pipe = df.IFSuperResolutionPipeline(
        **_if_parts(),
        unet=seeded(lambda: df.UNet2DConditionModel(**options)),
        scheduler=df.DDPMScheduler(clip_sample=False),
        image_noising_scheduler=df.DDPMScheduler(clip_sample=False),
    )
    small = {"image": noise(2, 3, 4, 4).clamp(-1, 1), "height": 8, "width": 8}
    return quiet(pipe, _PROMPTS | _DIRTY | small, smooth=_PIXELS)


def movq() -> Any:
    model = df.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=8,
        vq_embed_dim=4,
    )
    return seeded(lambda: model)


def image_embeds() -> dict[str, Tensor]:
    return {"image_embeds": noise(2, 16), "negative_image_embeds": noise(2, 16, seed=4)}


def kandinsky() -> Case:
    options = _SIMPLE | {
        "in_channels": 4,
        "out_channels": 8,
        "addition_embed_type": "image",
        "encoder_hid_dim_type": "image_proj",
        "encoder_hid_dim": 16,
        "resnet_time_scale_shift": "scale_shift",
    }
    pipe = df.KandinskyV22Pipeline(
        unet=seeded(lambda: df.UNet2DConditionModel(**options)),
        scheduler=df.DDIMScheduler(clip_sample=False),
        movq=movq(),
    )
    rest = {k: v for k, v in _PROMPTS.items() if k != "prompt"}
    return quiet(pipe, rest | image_embeds() | {"height": 16, "width": 16})


def _multilingual() -> Any:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        vocab_size=60,
        transformerDimSize=24,
        imageDimSize=16,
        max_position_embeddings=80,
        pad_token_id=1,
    )
    return seeded(lambda: MultilingualCLIP(config))


def mclip() -> Case:
    ids = torch.randint(3, 57, (2, 6), generator=torch.Generator().manual_seed(2))
    return Case(_multilingual(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, lambda o: o[0])


def kandinsky_2_1() -> Case:
    options = _SIMPLE | {
        "in_channels": 4,
        "out_channels": 8,
        "addition_embed_type": "text_image",
        "encoder_hid_dim_type": "text_image_proj",
        "encoder_hid_dim": 24,
        "cross_attention_dim": 16,
        "resnet_time_scale_shift": "scale_shift",
    }
    pipe = df.KandinskyPipeline(
        text_encoder=_multilingual(),
        tokenizer=letter_tokenizer(16),
        unet=seeded(lambda: df.UNet2DConditionModel(**options)),
        scheduler=df.DDIMScheduler(clip_sample=False),
        movq=movq(),
    )
    sizes = {"height": 16, "width": 16}
    return quiet(pipe, _PROMPTS | image_embeds() | sizes, smooth=_PIXELS)


def kandinsky_3() -> Case:
    unet = df.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=16,
        groups=4,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 16),
        cross_attention_dim=12,
        encoder_hid_dim=24,
    )
    pipe = df.Kandinsky3Pipeline(
        tokenizer=letter_tokenizer(16),
        text_encoder=t5(),
        unet=seeded(lambda: unet),
        scheduler=df.DDPMScheduler(clip_sample=False),
        movq=movq(),
    )
    return quiet(pipe, _PROMPTS | {"negative_prompt": ["b", "c"], "height": 64, "width": 64})


def _prior_parts(name: str = "{}") -> dict[str, Any]:
    """The parts of a prior, called as a pipeline calls them."""
    prior = df.PriorTransformer(
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=16,
        num_embeddings=16,
    )
    vision = hf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        image_size=28,
        num_attention_heads=2,
        patch_size=14,
        projection_dim=16,
    )
    parts = {
        "prior": seeded(lambda: prior),
        "image_encoder": seeded(lambda: hf.CLIPVisionModelWithProjection(vision)),
        "text_encoder": clip_text(True, hidden_size=16, num_attention_heads=2),
        "tokenizer": letter_tokenizer(16),
        "scheduler": df.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=False
        ),
        "image_processor": hf.CLIPImageProcessor(),
    }
    return {name.format(part): made for part, made in parts.items()}


def kandinsky_prior() -> Case:
    pipe = df.KandinskyV22PriorPipeline(**_prior_parts())
    return quiet(pipe, _PROMPTS, head=lambda o: o.image_embeds, smooth=_PIXELS)


def kandinsky_combined() -> Case:
    decoder = kandinsky().model
    parts = {"unet": decoder.unet, "scheduler": decoder.scheduler, "movq": decoder.movq}
    pipe = df.KandinskyV22CombinedPipeline(**parts, **_prior_parts("prior_{}"))
    sizes = {"height": 16, "width": 16, "prior_num_inference_steps": 2}
    return quiet(pipe, _PROMPTS | sizes, smooth=None)  # The pipelines that it calls follow no gradient.


# -- a prior and what follows it -------------------------------------------------------------------


def _unclip_scheduler(prediction: str = "epsilon", variance: str = "fixed_small_log") -> Any:
    return df.UnCLIPScheduler(variance_type=variance, prediction_type=prediction, clip_sample=False)


def unclip() -> Case:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    text_proj = UnCLIPTextProjModel(clip_embeddings_dim=16, time_embed_dim=32, cross_attention_dim=24)
    decoder = {k: v for k, v in _SIMPLE.items() if not k.startswith(("addition_", "encoder_hid"))}
    decoder |= {"class_embed_type": "identity", "resnet_time_scale_shift": "scale_shift"}
    larger = _MAP_UNET | {
        "sample_size": 16,
        "in_channels": 6,
        "out_channels": 3,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }
    prior = _prior_parts()
    pipe = df.UnCLIPPipeline(
        prior=prior["prior"],
        decoder=seeded(lambda: df.UNet2DConditionModel(**decoder)),
        text_encoder=prior["text_encoder"],
        tokenizer=prior["tokenizer"],
        text_proj=seeded(lambda: text_proj),
        super_res_first=seeded(lambda: df.UNet2DModel(**larger)),
        super_res_last=seeded(lambda: df.UNet2DModel(**larger)),
        prior_scheduler=_unclip_scheduler("sample"),
        # They make samples, not noise: of noise little is left at the last step, and what the decoder makes
        # of a first one is cut off far beyond white.
        decoder_scheduler=_unclip_scheduler("sample", "learned_range"),
        super_res_scheduler=_unclip_scheduler("sample"),
    )
    steps = {f"{part}_num_inference_steps": 2 for part in ("prior", "decoder", "super_res")}
    inputs = {"prompt": _PROMPTS["prompt"], "seed": 0, "output_type": "np"} | steps
    return quiet(pipe, inputs, head=lambda o: torch.as_tensor(o.images), smooth=None)


def _noised_parts() -> dict[str, Any]:
    """What Stable unCLIP's pipelines share: a UNet that takes a noised embedding for a class."""
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    unet = _UNET | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 32}
    return {
        "image_normalizer": seeded(lambda: StableUnCLIPImageNormalizer(embedding_dim=16)),
        "image_noising_scheduler": df.DDPMScheduler(),
        "tokenizer": letter_tokenizer(16),
        "text_encoder": clip_text(),
        "unet": seeded(lambda: df.UNet2DConditionModel(**unet)),
        "scheduler": df.DDIMScheduler(clip_sample=False, steps_offset=1),
        "vae": vae(),
    }


def stable_unclip() -> Case:
    prior = _prior_parts()
    pipe = df.StableUnCLIPPipeline(
        prior_tokenizer=prior["tokenizer"],
        prior_text_encoder=prior["text_encoder"],
        prior=prior["prior"],
        prior_scheduler=df.DDPMScheduler(prediction_type="sample", clip_sample=False),
        **_noised_parts(),
    )
    return quiet(pipe, _PROMPTS | {"prior_num_inference_steps": 2})


def stable_unclip_image() -> Case:
    parts = {"feature_extractor": hf.CLIPImageProcessor(), "image_encoder": _prior_parts()["image_encoder"]}
    pipe = df.StableUnCLIPImg2ImgPipeline(**parts, **_noised_parts())
    return quiet(pipe, _PROMPTS | {"image": noise(2, 3, 28, 28)})


# -- the same weights in other pipelines -----------------------------------------------------------


def _stable_diffusion(cls: Any, **unet: Any) -> Any:
    return cls(
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=letter_tokenizer(16),
        unet=seeded(lambda: df.UNet2DConditionModel(**_UNET | unet)),
        scheduler=df.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _picture() -> Tensor:
    return noise(2, 3, 16, 16).sigmoid()


def image_to_image() -> Case:
    pipe = _stable_diffusion(df.StableDiffusionImg2ImgPipeline)
    return quiet(pipe, _PROMPTS | {"image": _picture(), "strength": 1.0})


def adapter_weights(unet: Any, image: int = 16) -> dict[str, Any]:
    """An IP-Adapter's file: four tokens of an embedding, and keys and values for each cross-attention."""
    names = [n.removesuffix(".processor") for n in unet.attn_processors if ".attn2." in n]
    layers = [unet.get_submodule(n).to_k for n in names]
    text = layers[0].in_features
    projection = {
        "proj.weight": noise(4 * text, image, seed=6),
        "proj.bias": noise(4 * text, seed=7),
        "norm.weight": noise(text, seed=8),
        "norm.bias": noise(text, seed=9),
    }
    attention = {
        f"{2 * i + 1}.to_{x}_ip.weight": 0.3 * noise(k.out_features, text, seed=10 + 2 * i + n)
        for i, k in enumerate(layers)
        for n, x in enumerate("kv")
    }
    return {"image_proj": projection, "ip_adapter": attention}


def ip_adapter() -> Case:
    pipe = _stable_diffusion(df.StableDiffusionPipeline)
    pipe.register_modules(
        image_encoder=_prior_parts()["image_encoder"],
        feature_extractor=hf.CLIPImageProcessor(size=28, crop_size=28),
    )
    pipe.load_ip_adapter(adapter_weights(pipe.unet), subfolder="", weight_name="", low_cpu_mem_usage=False)
    pipe.unet.eval()
    picture = Image.fromarray((255 * noise(28, 28, 3).sigmoid()).byte().numpy())
    one = _PROMPTS | {"prompt": ["a cat"], "ip_adapter_image": [[picture, picture.rotate(90)]]}
    return quiet(pipe, one)


def inpainting() -> Case:
    pipe = _stable_diffusion(df.StableDiffusionInpaintPipeline, in_channels=9)
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, 8:] = 1
    sizes = {"image": _picture(), "mask_image": mask, "height": 16, "width": 16}
    return quiet(pipe, _PROMPTS | sizes)


def controlled() -> Case:
    parts = _stable_diffusion(df.StableDiffusionPipeline).components
    # Its way in makes a picture as small as the latents.
    small = {"load_weights_from_unet": False, "conditioning_embedding_out_channels": (16, 32)}
    control = seeded(lambda: df.ControlNetModel.from_unet(parts["unet"], **small))
    pipe = df.StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)
    return quiet(pipe, _PROMPTS | {"image": _picture()})


def consistency() -> Case:
    parts = _stable_diffusion(df.LatentConsistencyModelPipeline, time_cond_proj_dim=32).components
    parts["scheduler"] = df.LCMScheduler(original_inference_steps=10)
    pipe = df.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    return quiet(pipe, _PROMPTS)


def instruct_pix2pix() -> Case:
    pipe = _stable_diffusion(df.StableDiffusionInstructPix2PixPipeline, in_channels=8)
    return quiet(pipe, _PROMPTS | {"image": _picture()})


def flux_control() -> Case:
    parts = flux().model.components
    parts = {k: v for k, v in parts.items() if k not in ("image_encoder", "feature_extractor")}
    options = _FLUX | {"in_channels": 32, "out_channels": 16}
    parts["transformer"] = seeded(lambda: df.FluxTransformer2DModel(**options))
    sizes = {"height": 8, "width": 12, "max_sequence_length": 6}
    return quiet(
        df.FluxControlPipeline(**parts), _PROMPTS | sizes | {"control_image": noise(2, 3, 8, 12).sigmoid()}
    )


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        t5_encoder,
        sd3_transformer,
        stable_diffusion_3,
        flux_transformer,
        flux,
        qwen_image,
        pixart,
        dit,
        sana_transformer,
        sana,
        unconditional,
        unet2d,
        deepfloyd_if,
        deepfloyd_if_second_stage,
        kandinsky,
        mclip,
        kandinsky_2_1,
        kandinsky_3,
        kandinsky_prior,
        kandinsky_combined,
        unclip,
        stable_unclip,
        stable_unclip_image,
        ip_adapter,
        instruct_pix2pix,
    )
}
