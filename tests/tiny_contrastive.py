"""Tiny dual towers beside CLIP and SigLIP: random weights from a config, one builder per family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tiny import Case, pixels, seeded
from torch import Tensor

_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14, "projection_dim": 16,
}  # fmt: skip
_TEXT = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "vocab_size": 60, "max_position_embeddings": 16, "projection_dim": 16,
    "bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 0,
}  # fmt: skip


def _ids() -> dict[str, Tensor]:
    ids = torch.tensor([[58, 3, 4, 7, 59], [58, 5, 59, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def _dual(make: Callable[[], Any], *off_path: str) -> Case:
    return Case(seeded(make), _ids() | {"pixel_values": pixels()}, lambda o: o.logits_per_image, off_path)


def metaclip2() -> Case:
    text = _TEXT | {"eos_token_id": 59}
    config = hf.MetaClip2Config(text_config=text, vision_config=_VISION, projection_dim=16)
    return _dual(lambda: hf.MetaClip2Model(config))


def altclip() -> Case:
    # RoBERTa counts positions from the padding token's.
    text = _TEXT | {"pad_token_id": 1, "project_dim": 20, "max_position_embeddings": 18}
    config = hf.AltCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16)
    model = seeded(lambda: hf.AltCLIPModel(config))
    return Case(model, _ids() | {"pixel_values": pixels()}, lambda o: o.logits_per_image)


def chinese_clip() -> Case:
    config = hf.ChineseCLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=16)
    return _dual(lambda: hf.ChineseCLIPModel(config))


def siglip2() -> Case:
    text = _TEXT | {"projection_size": 32}
    vision = {k: v for k, v in _VISION.items() if k != "image_size"} | {"patch_size": 4, "num_patches": 4}
    config = hf.Siglip2Config(text_config=text, vision_config=vision)
    model = seeded(lambda: hf.Siglip2Model(config))
    g = torch.Generator().manual_seed(2)
    inputs = {
        "input_ids": torch.randint(3, 57, (2, 16), generator=g),
        "pixel_values": torch.randn(2, 6, 48, generator=g),
        "pixel_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
        "spatial_shapes": torch.tensor([[2, 3], [2, 2]]),
    }
    return Case(model, inputs, lambda o: o.logits_per_image)


def align() -> Case:
    vision = {
        "image_size": 28, "width_coefficient": 1.0, "depth_coefficient": 0.1, "hidden_dim": 24,
        "kernel_sizes": [3, 3], "in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2],
        "num_block_repeats": [1, 1], "expand_ratios": [1, 4], "depthwise_padding": [],
    }  # fmt: skip
    config = hf.AlignConfig(text_config=_TEXT, vision_config=vision, projection_dim=24)
    return _dual(lambda: hf.AlignModel(config))


def clap() -> Case:
    audio = {
        "spec_size": 16, "num_mel_bins": 4, "window_size": 2, "patch_size": 2, "patch_stride": [2, 2],
        "patch_embeds_hidden_size": 8, "depths": [2, 1], "num_attention_heads": [2, 2], "hidden_size": 16,
        "num_hidden_layers": 2, "mlp_ratio": 2.0, "projection_dim": 16, "drop_path_rate": 0.0,
    }  # fmt: skip
    text = _TEXT | {"pad_token_id": 1, "max_position_embeddings": 18}
    config = hf.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
    model = seeded(lambda: hf.ClapModel(config))
    sound = torch.randn(2, 1, 64, 4, generator=torch.Generator().manual_seed(4))
    inputs = _ids() | {"input_features": sound, "is_longer": torch.zeros(2, 1, dtype=torch.bool)}
    return Case(model, inputs, lambda o: o.logits_per_audio)


def _part(output: Any) -> Tensor:
    # What a norm gives has the same length whatever is edited; a part of it has not.
    return output.last_hidden_state[..., :5]


def bert() -> Case:
    model = seeded(lambda: hf.BertModel(hf.BertConfig(**_TEXT), add_pooling_layer=False))
    return Case(model, _ids(), _part)


def roberta() -> Case:
    config = hf.RobertaConfig(**_TEXT | {"pad_token_id": 1, "max_position_embeddings": 18})
    model = seeded(lambda: hf.RobertaModel(config, add_pooling_layer=False))
    return Case(model, _ids(), _part)


_OPEN_IDS = torch.tensor([[58, 3, 4, 7, 59, 0, 0, 0], [58, 5, 59, 0, 0, 0, 0, 0]])


def _cosines(output: Any) -> Tensor:
    return output["image_features"] @ output["text_features"].T


def _open_clip(vision: dict[str, Any], text: dict[str, Any] | None = None, size: int = 28) -> Case:
    from open_clip import CustomTextCLIP
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    words = {"context_length": 8, "vocab_size": 60, "width": 24, "heads": 3, "layers": 2}
    model = seeded(
        lambda: CustomTextCLIP(
            16, CLIPVisionCfg(**vision), CLIPTextCfg(**words | (text or {})), output_dict=True
        )
    )
    return Case(model, {"image": pixels(size=size), "text": _OPEN_IDS}, _cosines)


_PLAIN = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 14, "image_size": 28, "mlp_ratio": 1.5}


def open_clip_average() -> Case:
    return _open_clip(_PLAIN | {"pool_type": "avg"}, {"pool_type": "last"})


def open_clip_resnet() -> Case:
    return _open_clip({"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 64}, size=64)


def _timm(name: str, options: dict[str, Any]) -> Case:
    import timm
    from open_clip.timm_model import TimmModel

    # A tower made small: open_clip passes on no sizes.
    size = options["img_size"]
    case = _open_clip(_PLAIN)
    visual = TimmModel(name, 16, size, pool="token", proj="linear")
    visual.trunk = timm.create_model(name, num_classes=0, **options)
    visual.head.proj = torch.nn.Linear(visual.trunk.num_features, 16, bias=False)
    case.model.visual = seeded(lambda: visual)
    return Case(case.model, {"image": pixels(size=size), "text": _OPEN_IDS}, _cosines)


_SMALL = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}


def open_clip_timm_siglip() -> Case:
    return _timm("vit_tiny_patch16_224", _SMALL | {"global_pool": "map", "class_token": False})


def open_clip_eva() -> Case:
    return _timm("eva02_tiny_patch14_224", _SMALL | {"img_size": 28, "global_pool": "token"})


def open_clip_hf_text() -> Case:
    from open_clip.hf_model import HFTextEncoder

    case = _open_clip(_PLAIN)
    config = hf.BertConfig(**_TEXT)
    case.model.text = seeded(
        lambda: HFTextEncoder(
            "", 16, config=config, pooler_type="mean_pooler", proj_type="linear", pretrained=False
        )
    )
    return case


def coca() -> Case:
    from open_clip.coca_model import CoCa, MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    words = {"context_length": 8, "vocab_size": 60, "width": 24, "heads": 3, "layers": 2}
    text = CLIPTextCfg(**words, embed_cls=True, output_tokens=True)
    vision = CLIPVisionCfg(
        **_PLAIN, attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=4, output_tokens=True
    )

    def made() -> CoCa:
        model = CoCa(24, MultimodalCfg(**words), text, vision)
        # open_clip leaves it as memory was.
        torch.nn.init.normal_(model.text_decoder.text_projection, std=0.2)
        return model

    model = seeded(made)

    def head(output: Any) -> Tensor:
        return torch.cat([_cosines(output).flatten(), output["logits"].flatten()])

    return Case(model, {"image": pixels(), "text": _OPEN_IDS}, head)


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        metaclip2,
        altclip,
        chinese_clip,
        siglip2,
        align,
        clap,
        bert,
        roberta,
        open_clip_average,
        open_clip_resnet,
        open_clip_timm_siglip,
        open_clip_eva,
        open_clip_hf_text,
        coca,
    )
}
