"""One builder per family: random weights from a config, no downloads.

A case is the model, arguments it takes, and the tensor of its output that an edit must move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny_unified
import tiny_vlm
import torch
from tiny_case import Case, seeded, shaken  # noqa: F401
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14, "projection_dim": 16,
}  # fmt: skip
_TEXT = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "vocab_size": 60, "max_position_embeddings": 16, "projection_dim": 16,
    "bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 59,
}  # fmt: skip
_DECODER = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def pixels(rows: int = 2, size: int = 28) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def clip_text_ids() -> dict[str, Tensor]:
    ids = torch.tensor([[58, 3, 4, 7, 59], [58, 5, 59, 59, 59]])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}


def clip() -> Case:
    model = seeded(lambda: CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=16)))
    return Case(model, clip_text_ids() | {"pixel_values": pixels()}, lambda o: o.logits_per_image)


def clip_vision() -> Case:
    model = seeded(lambda: CLIPVisionModel(CLIPVisionConfig(**_VISION)))
    return Case(model, {"pixel_values": pixels()}, lambda o: o.pooler_output)


def clip_vision_projected() -> Case:
    model = seeded(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**_VISION)))
    return Case(model, {"pixel_values": pixels()}, lambda o: o.image_embeds)


def clip_text() -> Case:
    model = seeded(lambda: CLIPTextModel(CLIPTextConfig(**_TEXT)))
    return Case(model, clip_text_ids(), lambda o: o.pooler_output)


def clip_text_projected() -> Case:
    model = seeded(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**_TEXT)))
    return Case(model, clip_text_ids(), lambda o: o.text_embeds)


def siglip() -> Case:
    text = _TEXT | {"projection_size": 32}
    model = seeded(lambda: SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION)))
    ids = torch.randint(3, 57, (2, 16), generator=torch.Generator().manual_seed(2))
    return Case(model, {"input_ids": ids, "pixel_values": pixels()}, lambda o: o.logits_per_image)


def siglip_vision() -> Case:
    model = seeded(lambda: SiglipVisionModel(SiglipVisionConfig(**_VISION)))
    return Case(model, {"pixel_values": pixels()}, lambda o: o.pooler_output)


def siglip_text() -> Case:
    model = seeded(lambda: SiglipTextModel(SiglipTextConfig(**_TEXT)))
    ids = torch.randint(3, 57, (2, 16), generator=torch.Generator().manual_seed(2))
    return Case(model, {"input_ids": ids}, lambda o: o.pooler_output)


def _open_clip(custom: bool) -> Case:
    from open_clip import CLIP, CustomTextCLIP
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=3, width=32, head_width=8, patch_size=14, image_size=28, mlp_ratio=1.5)
    text = CLIPTextCfg(context_length=8, vocab_size=60, width=24, heads=3, layers=2)
    kind = CustomTextCLIP if custom else CLIP
    model = seeded(lambda: kind(16, vision, text, output_dict=True))
    ids = torch.tensor([[58, 3, 4, 7, 59, 0, 0, 0], [58, 5, 59, 0, 0, 0, 0, 0]])
    head = lambda o: o["image_features"] @ o["text_features"].T  # noqa: E731
    return Case(model, {"image": pixels(), "text": ids}, head)


def open_clip() -> Case:
    return _open_clip(custom=False)


def open_clip_custom_text() -> Case:
    return _open_clip(custom=True)


def llama() -> Case:
    model = seeded(lambda: LlamaModel(LlamaConfig(**_DECODER)))
    ids = torch.randint(3, 57, (2, 6), generator=torch.Generator().manual_seed(2))
    return Case(model, {"input_ids": ids}, lambda o: o.last_hidden_state)


def _llava(vision: Any, text: Any, layer: int, strategy: str) -> Case:
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=59,
        image_seq_length=4,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    model = seeded(lambda: LlavaForConditionalGeneration(config))
    words = torch.randint(3, 57, (2, 5), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([torch.ones(2, 1, dtype=torch.long), torch.full((2, 4), 59), words], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels()}
    # With feature layer -2 the tower's last block and final norm run for nothing; -1 spares the block.
    unused = (
        ("vision.blocks.2.*", "vision.ln_final.*") if layer == -2 else ("vision.ln_final.*", "vision.pool.*")
    )
    return Case(model, inputs, lambda o: o.logits, unused)


def llava() -> Case:
    return _llava(CLIPVisionConfig(**_VISION), LlamaConfig(**_DECODER), -2, "default")


def llava_siglip_qwen() -> Case:
    return _llava(SiglipVisionConfig(**_VISION), Qwen2Config(**_DECODER), -1, "full")


def llava_mistral() -> Case:
    return _llava(CLIPVisionConfig(**_VISION), MistralConfig(**_DECODER), -2, "default")


def unet() -> Case:
    from diffusers import UNet2DConditionModel

    model = seeded(lambda: UNet2DConditionModel(**_UNET))
    g = torch.Generator().manual_seed(3)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, generator=g),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": torch.randn(2, 7, 24, generator=g),
    }
    return Case(model, inputs, lambda o: o.sample)


_UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
    "block_out_channels": (16, 32), "norm_num_groups": 4, "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
_VAE = {
    "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def letter_tokenizer(length: int) -> Any:
    """A CLIP tokenizer whose tokens are letters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def _pipeline_inputs() -> dict[str, Any]:
    return {"prompt": ["a cat", "a dog"], "num_inference_steps": 2, "seed": 0, "output_type": "pt"}


def stable_diffusion() -> Case:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    text = seeded(lambda: CLIPTextModel(CLIPTextConfig(**_TEXT | {"bos_token_id": 52, "eos_token_id": 53})))
    pipe = StableDiffusionPipeline(
        vae=seeded(lambda: AutoencoderKL(**_VAE)),
        text_encoder=text,
        tokenizer=letter_tokenizer(16),
        unet=seeded(lambda: UNet2DConditionModel(**_UNET)),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return Case(pipe, _pipeline_inputs(), lambda o: o.images)


def stable_diffusion_xl() -> Case:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    config = CLIPTextConfig(**_TEXT | {"bos_token_id": 52, "eos_token_id": 53, "num_hidden_layers": 3})
    unet = _UNET | {
        "cross_attention_dim": 48,
        "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 48,
        "use_linear_projection": True,
    }
    pipe = StableDiffusionXLPipeline(
        vae=seeded(lambda: AutoencoderKL(**_VAE)),
        text_encoder=seeded(lambda: CLIPTextModel(config)),
        text_encoder_2=seeded(lambda: CLIPTextModelWithProjection(config)),
        tokenizer=letter_tokenizer(16),
        tokenizer_2=letter_tokenizer(16),
        unet=seeded(lambda: UNet2DConditionModel(**unet)),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )
    pipe.set_progress_bar_config(disable=True)
    # Its first encoder is read at the layer before the last, and is not pooled.
    unused = ("text.blocks.2.*", "text.ln_final.*")
    return Case(pipe, _pipeline_inputs(), lambda o: o.images, unused)


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        clip,
        clip_vision,
        clip_vision_projected,
        clip_text,
        clip_text_projected,
        siglip,
        siglip_vision,
        siglip_text,
        open_clip,
        open_clip_custom_text,
        llama,
        llava,
        llava_siglip_qwen,
        llava_mistral,
        unet,
        stable_diffusion,
        stable_diffusion_xl,
    )
}

# Each file of families adds its own.
from tiny_contrastive import CASES as CONTRASTIVE_CASES  # noqa: E402
from tiny_diffusion import CASES as DIFFUSION_CASES  # noqa: E402
from tiny_vision import CASES as VISION_CASES  # noqa: E402

CASES |= CONTRASTIVE_CASES | VISION_CASES | DIFFUSION_CASES | tiny_vlm.CASES | tiny_unified.CASES
