"""Tiny vision-language models: random weights from a config, one builder per family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tiny_case import Case, seeded
from torch import Tensor

IMAGE = 59  # The token that stands where image features go.

VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
DECODER = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 96,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "in_channels": 3,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(*runs: list[int], image: int = IMAGE) -> dict[str, Tensor]:
    """One row per list: a start token, its tokens (`image` repeated -n times for -n), and words."""
    rows = [[1, *(t for n in run for t in ([image] * -n if n < 0 else [n])), 5, 9] for run in runs]
    longest = max(map(len, rows))
    padded = [row + [0] * (longest - len(row)) for row in rows]
    ids = torch.tensor(padded)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def logits(output: Any) -> Tensor:
    return output.logits


def llava_square() -> Case:
    config = hf.LlavaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**DECODER),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = seeded(lambda: hf.LlavaForConditionalGeneration(config))
    return Case(model, prompt([-4], [-4]) | {"pixel_values": noise(2, 3, 8, 8)}, logits)


def llava_next() -> Case:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**DECODER),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )
    model = seeded(lambda: hf.LlavaNextForConditionalGeneration(config))
    # 8 x 16 pixels: the whole and two tiles; 16 x 6 is padded on both sides, and unpadded later.
    sizes = torch.tensor([[8, 16], [16, 6]])
    inputs = prompt([-(4 + 2 * 5)], [-(4 + 4 * 3)]) | {"pixel_values": noise(2, 3, 3, 8, 8)}
    # The features are those before the last block.
    return Case(model, inputs | {"image_sizes": sizes}, logits, ("vision.blocks.1.*", "vision.ln_final.*"))


def llava_onevision() -> Case:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION),
        text_config=hf.Qwen2Config(**DECODER),
        image_token_index=IMAGE,
        video_token_index=60,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
        vision_aspect_ratio="anyres_max_9",
    )
    model = seeded(lambda: hf.LlavaOnevisionForConditionalGeneration(config))
    sizes = torch.tensor([[8, 16], [16, 6]])
    inputs = prompt([-(4 + 2 * 5)], [-(4 + 4 * 3)]) | {"pixel_values": noise(2, 3, 3, 8, 8)}
    return Case(model, inputs | {"image_sizes": sizes}, logits, ("vision.ln_final.*", "vision.pool.*"))


def _packed(sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Patches of images of these (rows, columns), cut beforehand, as Qwen's processors give them."""
    grid = torch.tensor([[1, rows, cols] for rows, cols in sizes])
    runs = [[61, -(rows * cols // 4), 62] for rows, cols in sizes]
    ids = prompt(*runs)
    types = (ids["input_ids"] == IMAGE).int()
    patches = noise(sum(r * c for r, c in sizes), 3 * 2 * 4 * 4)
    return ids | {"mm_token_type_ids": types, "pixel_values": patches, "image_grid_thw": grid}


_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 60,
    "vision_start_token_id": 61,
    "vision_end_token_id": 62,
}


def qwen2_vl() -> Case:
    config = hf.Qwen2VLConfig(
        vision_config=QWEN_VISION | {"embed_dim": 24, "hidden_size": 24, "mlp_ratio": 2},
        text_config=DECODER | {"rope_parameters": MROPE},
        **_QWEN_TOKENS,
    )
    model = seeded(lambda: hf.Qwen2VLForConditionalGeneration(config))
    return Case(model, _packed([(4, 2), (2, 4)]), logits)


def qwen2_5_vl() -> Case:
    config = hf.Qwen2_5_VLConfig(
        vision_config=QWEN_VISION
        | {
            "hidden_size": 24,
            "out_hidden_size": 24,
            "intermediate_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text_config=DECODER | {"rope_parameters": MROPE},
        **_QWEN_TOKENS,
    )
    model = seeded(lambda: hf.Qwen2_5_VLForConditionalGeneration(config))
    return Case(model, _packed([(6, 6), (2, 4)]), logits)


def qwen3_vl() -> Case:
    config = hf.Qwen3VLConfig(
        vision_config=QWEN_VISION
        | {
            "hidden_size": 24,
            "out_hidden_size": 24,
            "intermediate_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        text_config=DECODER | {"head_dim": 6, "rope_parameters": MROPE},
        **_QWEN_TOKENS,
    )
    model = seeded(lambda: hf.Qwen3VLForConditionalGeneration(config))
    return Case(model, _packed([(4, 2), (2, 4)]), logits)


def molmo2(**text: Any) -> Case:
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "hidden_size": 24,
        "intermediate_size": 32,
    }
    config = hf.Molmo2Config(
        vision_config=heads | {"num_hidden_layers": 2, "image_size": [16, 16], "patch_size": 4},
        adapter_config=heads | {"vision_feature_layer": [1, 0], "text_hidden_size": 24},
        text_config=DECODER | {"head_dim": 6, "additional_vocab_size": 4} | text,
        image_patch_id=IMAGE,
    )
    model = seeded(lambda: hf.Molmo2ForConditionalGeneration(config))
    # One image is two crops wide, whose patches are told by number; four of them make a token.
    grids = torch.tensor([[2, 2, 2, 4], [2, 2, 2, 2]])
    row, crops = [61, -2, 63, -2, 63, 62], torch.arange(5 * 16).view(5, 4, 4)
    views = [crops[0], torch.cat([crops[1], crops[2]], 1), crops[3], crops[4]]
    pools = [v.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4) for v in views]
    ids = prompt([*row, 61, -4, 63, -4, 63, 62], [*row, *row])
    inputs = {"pixel_values": noise(5, 16, 48), "image_token_pooling": torch.cat(pools), "image_grids": grids}
    types = {"mm_token_type_ids": (ids["input_ids"] == IMAGE).int()}
    return Case(model, ids | types | inputs, logits)


def paligemma() -> Case:
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.GemmaConfig(**DECODER, head_dim=6),
        image_token_index=IMAGE,
        projection_dim=24,
        hidden_size=24,
    )
    model = seeded(lambda: hf.PaliGemmaForConditionalGeneration(config))
    return Case(model, prompt([-4, 7], [-4]) | {"pixel_values": noise(2, 3, 8, 8)}, logits)


def gemma3() -> Case:
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION | {"image_size": 16}, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(
            **DECODER,
            head_dim=6,
            sliding_window=8,
            query_pre_attn_scalar=6,
            layer_types=["sliding_attention", "full_attention"],
        ),
        image_token_index=IMAGE,
        boi_token_index=61,
        eoi_token_index=62,
        mm_tokens_per_image=4,
    )
    model = seeded(lambda: hf.Gemma3ForConditionalGeneration(config))
    inputs = prompt([61, -4, 62, 7], [61, -4, 62])
    types = (inputs["input_ids"] == IMAGE).int()
    return Case(model, inputs | {"token_type_ids": types, "pixel_values": noise(2, 3, 16, 16)}, logits)


def _tiled(make: Any, vision: dict[str, Any], **more: Any) -> Any:
    return make(vision_config=VISION | {"image_size": 16} | vision, image_token_id=IMAGE, **more)


def idefics2() -> Case:
    perceiver = {
        "hidden_size": 24,
        "resampler_n_latents": 3,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 6,
        "num_key_value_heads": 2,
    }
    config = _tiled(
        hf.Idefics2Config, {}, perceiver_config=perceiver, text_config=hf.MistralConfig(**DECODER)
    )
    model = seeded(lambda: hf.Idefics2ForConditionalGeneration(config))
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    mask[1, :, :, 8:] = False  # The second image is half as wide.
    inputs = prompt([61, -3, 61], [61, -3, 61]) | {"pixel_values": noise(2, 1, 3, 16, 16)}
    return Case(model, inputs | {"pixel_attention_mask": mask}, logits)


def idefics3() -> Case:
    config = _tiled(hf.Idefics3Config, {}, scale_factor=2, text_config=hf.LlamaConfig(**DECODER))
    model = seeded(lambda: hf.Idefics3ForConditionalGeneration(config))
    return Case(model, _split_in_tiles(), logits)


def smolvlm() -> Case:
    config = _tiled(hf.SmolVLMConfig, {}, scale_factor=2, text_config=hf.LlamaConfig(**DECODER))
    model = seeded(lambda: hf.SmolVLMForConditionalGeneration(config))
    return Case(model, _split_in_tiles(), logits)


def _split_in_tiles() -> dict[str, Tensor]:
    """Two tiles and the whole, then an image that was not split, as Idefics' processors write them."""
    inputs = prompt([61, 50, -4, 61, 51, -4, 54, 61, 52, -4, 61], [61, 52, -4, 61])
    values = noise(2, 3, 3, 16, 16)
    values[1, 1:] = 0  # Padding: an image of zeros is none.
    mask = torch.ones(2, 3, 16, 16, dtype=torch.bool)
    mask[1, 1:] = False
    return inputs | {"pixel_values": values, "pixel_attention_mask": mask}


_QFORMER = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "cross_attention_frequency": 2, "encoder_hidden_size": 24, "vocab_size": 64,
    "max_position_embeddings": 32,
}  # fmt: skip
_OPT = {
    "hidden_size": 24, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 96, "word_embed_proj_dim": 24, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_T5 = {
    "d_model": 24, "d_ff": 32, "d_kv": 6, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
    "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
}  # fmt: skip


def blip_2() -> Case:
    config = hf.Blip2Config(
        vision_config=VISION,
        qformer_config=_QFORMER,
        text_config=hf.OPTConfig(**_OPT),
        num_query_tokens=3,
        image_token_index=IMAGE,
    )
    model = seeded(lambda: hf.Blip2ForConditionalGeneration(config))
    return Case(model, prompt([-3, 7], [-3]) | {"pixel_values": noise(2, 3, 8, 8)}, logits)


def blip_2_t5() -> Case:
    config = hf.Blip2Config(
        vision_config=VISION,
        qformer_config=_QFORMER,
        text_config=hf.T5Config(**_T5),
        num_query_tokens=3,
        image_token_index=IMAGE,
    )
    model = seeded(lambda: hf.Blip2ForConditionalGeneration(config))
    inputs = prompt([-3, 7], [-3]) | {"pixel_values": noise(2, 3, 8, 8)}
    return Case(model, inputs | {"decoder_input_ids": torch.tensor([[0, 7, 8], [0, 9, 4]])}, logits)


def instructblip() -> Case:
    config = hf.InstructBlipConfig(
        vision_config=VISION,
        qformer_config=_QFORMER,
        text_config=hf.LlamaConfig(**DECODER),
        num_query_tokens=3,
        image_token_index=IMAGE,
    )
    model = seeded(lambda: hf.InstructBlipForConditionalGeneration(config))
    asked = torch.tensor([[11, 12, 13], [11, 14, 0]])
    inputs = prompt([-3, 7], [-3]) | {"pixel_values": noise(2, 3, 8, 8)}
    more = {"qformer_input_ids": asked, "qformer_attention_mask": (asked != 0).long()}
    # The words are read by the last block's queries no more.
    unused = ("qformer.blocks.1.text_mlp.*", "qformer.blocks.1.hook_text_*")
    return Case(model, inputs | more, logits, unused)


_BLIP_TEXT = {
    "hidden_size": 24, "encoder_hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 32, "projection_dim": 16,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 3,
}  # fmt: skip


def _blip(make: Any, head: Any, off_path: tuple[str, ...] = (), **more: Any) -> Case:
    config = hf.BlipConfig(
        text_config=_BLIP_TEXT, vision_config=VISION, projection_dim=16, image_text_hidden_size=24
    )
    model = seeded(lambda: make(config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "crossattention.self" in name:  # It would read all patches alike.
                weight.mul_(4)
    ids = torch.tensor([[1, 7, 8, 3], [1, 9, 3, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": noise(2, 3, 8, 8)}
    return Case(model, inputs | more, head, off_path)


def blip() -> Case:
    return _blip(hf.BlipForConditionalGeneration, logits)


def blip_vqa() -> Case:
    asked = {"decoder_input_ids": torch.tensor([[1, 7, 8], [1, 9, 4]])}
    # Its forward gives a loss and no logits.
    return _blip(
        hf.BlipForQuestionAnswering,
        lambda o: 100 * o.loss,
        **asked,
        labels=torch.tensor([[1, 7, 8], [1, 9, 4]]),
    )


def blip_itm() -> Case:
    return _blip(hf.BlipForImageTextRetrieval, lambda o: o.itm_score)


def mllama() -> Case:
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 2, "image_size": 8, "patch_size": 4, "max_num_tiles": 2, "vision_output_dim": 48,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }  # fmt: skip
    text = DECODER | {
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    model = seeded(lambda: hf.MllamaForConditionalGeneration(config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name and "proj" not in name:  # A new model's are closed.
                weight.fill_(0.8)
    inputs = prompt([-1, 7], [-1]) | {"pixel_values": noise(2, 1, 2, 3, 8, 8)}
    length = inputs["input_ids"].shape[1]
    return Case(
        model,
        inputs
        | {
            "aspect_ratio_ids": torch.tensor([[2], [1]]),
            "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]]),
            "cross_attention_mask": torch.tensor([[[[1, 1]]], [[[1, 0]]]]).repeat(1, length, 1, 1),
        },
        logits,
    )


def internvl() -> Case:
    vision = VISION | {"image_size": [8, 8], "patch_size": [4, 4]}
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**DECODER), image_token_id=IMAGE, image_seq_length=1
    )
    model = seeded(lambda: hf.InternVLForConditionalGeneration(config))
    # Two tiles and the whole, and one image that is not cut.
    inputs = prompt([61, -3, 62], [61, -1, 62]) | {"pixel_values": noise(4, 3, 8, 8)}
    return Case(model, inputs, logits, ("vision.ln_final.*",))


_PIXTRAL = VISION | {"head_dim": 12, "image_size": 16}


def pixtral() -> Case:
    config = hf.LlavaConfig(
        vision_config=hf.PixtralVisionConfig(**_PIXTRAL),
        text_config=hf.MistralConfig(**DECODER),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = seeded(lambda: hf.LlavaForConditionalGeneration(config))
    inputs = prompt([-2, 50, -2, 50, -2, 51], [-3, 50, -3, 51]) | {"pixel_values": noise(2, 3, 12, 12)}
    return Case(model, inputs | {"image_sizes": torch.tensor([[12, 8], [8, 12]])}, logits)


def mistral3() -> Case:
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**_PIXTRAL),
        text_config=hf.MistralConfig(**DECODER),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    model = seeded(lambda: hf.Mistral3ForConditionalGeneration(config))
    inputs = prompt([-1, 50, -1, 51], [-2, 51]) | {"pixel_values": noise(2, 3, 16, 16)}
    return Case(model, inputs | {"image_sizes": torch.tensor([[16, 8], [8, 16]])}, logits)


def kosmos2() -> Case:
    text = {
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "embed_dim": 24,
        "layers": 2,
        "ffn_dim": 32,
        "attention_heads": 2,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    config = hf.Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=3)
    model = seeded(lambda: hf.Kosmos2ForConditionalGeneration(config))
    ids = torch.tensor([[0, 61, 4, 5, 6, 62, 7, 8], [0, 61, 4, 5, 6, 62, 9, 10]])
    at = ((ids >= 4) & (ids <= 6)).long()
    inputs = {"input_ids": ids, "image_embeds_position_mask": at, "pixel_values": noise(2, 3, 8, 8)}
    return Case(model, inputs | {"attention_mask": torch.ones_like(ids)}, logits)


def florence2() -> Case:
    vision = {
        "depths": [1, 1], "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1],
        "patch_prenorm": [False, True], "embed_dim": [8, 16], "num_heads": [2, 2], "num_groups": [2, 2],
        "window_size": 2, "projection_dim": 24, "drop_path_rate": 0.0, "max_position_embeddings": 8,
    }  # fmt: skip
    text = hf.BartConfig(
        vocab_size=64,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    config = hf.Florence2Config(vision_config=vision, text_config=text, image_token_id=IMAGE)
    model = seeded(lambda: hf.Florence2ForConditionalGeneration(config))
    inputs = prompt([-5, 7], [-5]) | {"pixel_values": noise(2, 3, 8, 8)}
    return Case(model, inputs | {"decoder_input_ids": torch.tensor([[2, 7, 8], [2, 9, 4]])}, logits)


def _words(make: Any, config: Any) -> Case:
    ids = torch.tensor([[1, 7, 8, 9], [1, 9, 4, 3]])
    return Case(seeded(lambda: make(config)), {"input_ids": ids}, logits)


def opt_lm() -> Case:
    return _words(hf.OPTForCausalLM, hf.OPTConfig(**_OPT))


def llama_lm() -> Case:
    return _words(hf.LlamaForCausalLM, hf.LlamaConfig(**DECODER))


# Names of records, from their beginning, whose models this transformers is too old to have.
LACKING = () if hasattr(hf, "Molmo2Config") else ("molmo2",)
CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        molmo2,
        paligemma,
        gemma3,
        idefics2,
        idefics3,
        smolvlm,
        blip_2,
        blip_2_t5,
        instructblip,
        blip,
        blip_vqa,
        blip_itm,
        mllama,
        internvl,
        pixtral,
        mistral3,
        kosmos2,
        florence2,
        opt_lm,
        llama_lm,
    )
    if not f.__name__.startswith(LACKING)
}
