"""Tiny models of images as words: random weights from a config, one builder per family."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from tiny_case import Case, seeded
from tiny_vlm import DECODER, IMAGE, VISION, logits, noise, prompt

_VQ = {
    "embed_dim": 4,
    "num_embeddings": 16,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "in_channels": 3,
}


def chameleon() -> Case:
    # Its names spell a code's digits in letters.
    digits = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = {f"IMGIMG{str(i).translate(digits)}Z": 16 + i for i in range(16)} | {"<image>": IMAGE}
    config = hf.ChameleonConfig(**DECODER, vq_config=_VQ | {"resolution": 8}, vocabulary_map=names)
    model = seeded(lambda: hf.ChameleonForConditionalGeneration(config))
    return Case(
        model,
        prompt([61, -16, 62], [61, -16, 62]) | {"pixel_values": noise(2, 3, 8, 8)},
        lambda o: o.logits[..., 32:],
    )  # It may not say an image's words, whose logits are cut off.


def janus() -> Case:
    vision = {k: v for k, v in VISION.items() if k != "intermediate_size"}
    vision |= {"mlp_ratio": 1.5, "projection_dim": 24, "depth": 2, "num_image_tokens": 4}
    vq = _VQ | {"num_patches": 4, "out_channels": 3, "projection_dim": 24, "image_token_embed_dim": 24}
    config = hf.JanusConfig(
        text_config=hf.LlamaConfig(**DECODER), vision_config=vision, vq_config=vq, image_token_id=IMAGE
    )
    model = seeded(lambda: hf.JanusForConditionalGeneration(config))
    return Case(model, prompt([61, -4, 62, 7], [61, -4, 62]) | {"pixel_values": noise(2, 3, 8, 8)}, logits)


def emu3() -> Case:
    vq = {"codebook_size": 16, "embed_dim": 4, "latent_channels": 4, "base_channels": 32,
          "channel_multiplier": [1, 1], "num_res_blocks": 1, "hidden_size": 32, "attn_resolutions": [],
          "temporal_downsample_factor": 2}  # fmt: skip
    names = {f"<|visual token {i:06d}|>": 16 + i for i in range(16)}
    names |= {"<image>": IMAGE, "<|extra_200|>": 60}
    text = DECODER | {"attention_dropout": 0.0}
    config = hf.Emu3Config(vq_config=vq, text_config=text, vocabulary_map=names)
    model = seeded(lambda: hf.Emu3ForConditionalGeneration(config))
    # 8 x 8 pixels are 4 rows of 4 codes and a line end; the second image is less wide.
    inputs = prompt([61, -20, 62], [61, -12, 62]) | {"pixel_values": noise(2, 3, 8, 8)}

    return Case(model, inputs | {"image_sizes": torch.tensor([[8, 8], [8, 4]])}, logits)


CASES: dict[str, Callable[[], Case]] = {f.__name__: f for f in (chameleon, janus, emu3)}
