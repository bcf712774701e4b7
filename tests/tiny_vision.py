"""Tiny image towers that stand alone: random weights from a config, one builder per family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tiny import Case, pixels, seeded
from torch import Tensor

_VIT = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def _hidden(output: Any) -> Tensor:
    # What a norm gives has the same length whatever is edited; a part of it has not.
    return output.last_hidden_state[..., :5]


def _tower(
    make: Callable[[], Any],
    head: Callable[[Any], Tensor],
    *off_path: str,
    key: str = "pixel_values",
    size: int = 28,
) -> Case:
    return Case(seeded(make), {key: pixels(size=size)}, head, off_path)


def vit() -> Case:
    head = lambda o: torch.cat([o.last_hidden_state.flatten(1), o.pooler_output], 1)  # noqa: E731
    return _tower(lambda: hf.ViTModel(hf.ViTConfig(**_VIT)), head)


def deit() -> Case:
    config = hf.DeiTConfig(**_VIT)
    return _tower(lambda: hf.DeiTModel(config, add_pooling_layer=False), _hidden)


def vit_classifier() -> Case:
    config = hf.ViTConfig(**_VIT, num_labels=3)
    return _tower(lambda: hf.ViTForImageClassification(config), lambda o: o.logits)


def deit_classifier() -> Case:
    config = hf.DeiTConfig(**_VIT, num_labels=3)
    return _tower(lambda: hf.DeiTForImageClassification(config), lambda o: o.logits)


def dinov2() -> Case:
    return _tower(lambda: hf.Dinov2Model(hf.Dinov2Config(**_VIT, mlp_ratio=2)), _hidden)


def dinov2_registers() -> Case:
    config = hf.Dinov2WithRegistersConfig(**_VIT, num_register_tokens=2, use_swiglu_ffn=True)
    return _tower(lambda: hf.Dinov2WithRegistersModel(config), _hidden)


def dinov3() -> Case:
    config = hf.DINOv3ViTConfig(**_VIT | {"hidden_size": 24}, num_register_tokens=2)
    return _tower(lambda: hf.DINOv3ViTModel(config), _hidden)


def dinov3_gated() -> Case:
    config = hf.DINOv3ViTConfig(**_VIT, num_register_tokens=0, use_gated_mlp=True)
    return _tower(lambda: hf.DINOv3ViTModel(config), _hidden)


_BEIT = _VIT | {"layer_scale_init_value": 0.5, "use_relative_position_bias": True}


def beit() -> Case:
    head = lambda o: torch.cat([o.last_hidden_state[..., :5].flatten(1), o.pooler_output], 1)  # noqa: E731
    config = hf.BeitConfig(**_BEIT, use_mean_pooling=True)
    return _tower(lambda: hf.BeitModel(config), head)


def beit_plain() -> Case:
    config = hf.BeitConfig(
        **_VIT, layer_scale_init_value=0.0, use_absolute_position_embeddings=True, use_mean_pooling=False
    )
    return _tower(lambda: hf.BeitModel(config), _hidden)


def beit_classifier() -> Case:
    config = hf.BeitConfig(**_BEIT, num_labels=3)
    return _tower(lambda: hf.BeitForImageClassification(config), lambda o: o.logits)


def ijepa() -> Case:
    return _tower(lambda: hf.IJepaModel(hf.IJepaConfig(**_VIT)), _hidden)


def ijepa_classifier() -> Case:
    config = hf.IJepaConfig(**_VIT, num_labels=3)
    return _tower(lambda: hf.IJepaForImageClassification(config), lambda o: o.logits)


# Grids of 11 x 11, 6 x 6 and 3 x 3 patches in windows of 3 x 3: some padded, some rolled.
_SWIN = {
    "image_size": 44, "patch_size": 4, "embed_dim": 12, "depths": [2, 1, 2], "num_heads": [2, 3, 4],
    "window_size": 3, "mlp_ratio": 2.0,
}  # fmt: skip
_SWIN_SMALL = _SWIN | {"image_size": 24, "depths": [2, 1], "num_heads": [2, 3], "num_labels": 3}


def swin() -> Case:
    return _tower(lambda: hf.SwinModel(hf.SwinConfig(**_SWIN)), _hidden, size=44)


def swin_classifier() -> Case:
    config = hf.SwinConfig(**_SWIN_SMALL, drop_path_rate=0.0, use_absolute_embeddings=True)
    return _tower(lambda: hf.SwinForImageClassification(config), lambda o: o.logits, size=24)


def swinv2() -> Case:
    return _tower(lambda: hf.Swinv2Model(hf.Swinv2Config(**_SWIN)), _hidden, size=44)


def swinv2_classifier() -> Case:
    config = hf.Swinv2Config(**_SWIN_SMALL)
    return _tower(lambda: hf.Swinv2ForImageClassification(config), lambda o: o.logits, size=24)


_TIMM = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def timm_vit() -> Case:
    from timm.models.vision_transformer import VisionTransformer

    make = lambda: VisionTransformer(**_TIMM, mlp_ratio=1.5, init_values=0.5, pre_norm=True)  # noqa: E731
    return _tower(make, lambda o: o, key="x")


def timm_vit_average() -> Case:
    from timm.models.vision_transformer import VisionTransformer

    make = lambda: VisionTransformer(**_TIMM, mlp_ratio=1.5, global_pool="avg", reg_tokens=2)  # noqa: E731
    return _tower(make, lambda o: o, key="x")


def timm_eva() -> Case:
    from timm.models.eva import Eva

    options = _TIMM | {"embed_dim": 32, "num_heads": 4, "qkv_fused": False, "swiglu_mlp": True}
    options |= {"scale_mlp": True, "mlp_ratio": 1.5, "use_rot_pos_emb": True, "init_values": 0.5}
    return _tower(lambda: Eva(**options), lambda o: o, key="x")


def timm_eva_fused() -> Case:
    from timm.models.eva import Eva

    return _tower(lambda: Eva(**_TIMM, mlp_ratio=1.5, global_pool="token"), lambda o: o, key="x")


def timm_wrapper() -> Case:
    config = hf.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 16},
    )
    return _tower(lambda: hf.TimmWrapperModel(config), lambda o: o.pooler_output, size=32)


_RESNET = {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [2, 1], "hidden_act": "relu"}


def resnet() -> Case:
    return _tower(lambda: hf.ResNetModel(hf.ResNetConfig(**_RESNET)), lambda o: o.pooler_output)


def resnet_classifier() -> Case:
    config = hf.ResNetConfig(**_RESNET | {"layer_type": "basic"}, num_labels=3)
    return _tower(lambda: hf.ResNetForImageClassification(config), lambda o: o.logits)


def torch_resnet() -> Case:
    from torchvision.models.resnet import Bottleneck, ResNet

    make = lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=8)  # noqa: E731
    return _tower(make, lambda o: o, key="x", size=32)


def timm_resnet() -> Case:
    from timm.models.resnet import BasicBlock, ResNet

    make = lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5, channels=(8, 8, 16, 16))  # noqa: E731
    return _tower(make, lambda o: o, key="x", size=32)


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        vit,
        deit,
        vit_classifier,
        deit_classifier,
        dinov2,
        dinov2_registers,
        dinov3,
        dinov3_gated,
        beit,
        beit_plain,
        beit_classifier,
        ijepa,
        ijepa_classifier,
        swin,
        swin_classifier,
        swinv2,
        swinv2_classifier,
        timm_vit,
        timm_vit_average,
        timm_eva,
        timm_eva_fused,
        timm_wrapper,
        resnet,
        resnet_classifier,
        torch_resnet,
        timm_resnet,
    )
}
