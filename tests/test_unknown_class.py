"""A class that no family covers: the error's record is pasted as it stands, and does."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import mm_adapters as mm
from mm_adapters.records import registry as _registry

ROOT = Path(__file__).parents[1]
_VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
_WINDOWS = {
    "image_size": 28, "patch_size": 4, "embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3],
    "window_size": 2, "mlp_ratio": 2.0,
}  # fmt: skip
_TEXT = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "vocab_size": 60, "max_position_embeddings": 32,
}  # fmt: skip
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    mm.families.records()
    monkeypatch.setattr(_registry, "_RECORDS", dict(_registry._RECORDS))


def refused(model: Any) -> str:
    with pytest.raises(mm.UnknownFamilyError) as raised:
        mm.wrap(model)
    return str(raised.value)


def pasted(said: str) -> None:
    """Runs the record that an error shows, as a user's file would; the project's linter passes it."""
    record = said.split("\n\n", 1)[1].rstrip() + "\n"
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "-"]
    done = subprocess.run(ruff, input=record, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    imported = [n.module for n in ast.walk(ast.parse(record)) if isinstance(n, ast.ImportFrom)]
    assert imported == ["mm_adapters.records"]
    exec(compile(record, "record.py", "exec"), {})


def vip_llava() -> nn.Module:
    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION),
        text_config=hf.LlamaConfig(**_TEXT),
        image_token_index=59,
        vision_feature_layers=[-1],
    )
    return hf.VipLlavaForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "inputs", "nearest", "has"),
    [
        (
            lambda: hf.ViTMSNModel(hf.ViTMSNConfig(**_VISION)),
            {"pixel_values": PIXELS},
            "vit",
            ["vision.blocks.1.attn.hook_pattern", "vision.blocks.1.mlp.hook_post"],
        ),
        (
            lambda: hf.DonutSwinModel(hf.DonutSwinConfig(**_WINDOWS)),
            {"pixel_values": PIXELS},
            "swin",
            ["vision.blocks.0.attn.hook_pattern", "vision.blocks.2.mlp.hook_post"],
        ),
        (
            lambda: hf.Data2VecVisionModel(hf.Data2VecVisionConfig(**_VISION)),
            {"pixel_values": PIXELS},
            None,
            ["vision.blocks.1.attn.hook_z", "vision.blocks.0.ln2.hook_scale"],
        ),
        (
            lambda: hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**_VISION)),
            {"pixel_values": PIXELS},
            None,
            ["vision.blocks.1.attn.hook_z", "vision.blocks.1.mlp.hook_pre_linear"],
        ),
        (
            lambda: hf.ElectraModel(hf.ElectraConfig(**_TEXT)),
            {"input_ids": IDS},
            "bert",
            ["text.blocks.1.attn.hook_q", "text.blocks.1.hook_mlp_out"],
        ),
        (
            lambda: hf.OwlViTModel(
                hf.OwlViTConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=16)
            ),
            {"input_ids": IDS, "pixel_values": PIXELS},
            "siglip_vision",  # Their blocks are CLIP's, both.
            ["vision.blocks.1.attn.hook_pattern", "text.blocks.1.attn.hook_pattern"],
        ),
        (vip_llava, None, None, ["vision.blocks.1.attn.hook_pattern", "language.blocks.1.mlp.hook_post"]),
    ],
    ids=["vit_msn", "donut_swin", "data2vec", "aimv2", "electra", "owlvit", "vipllava"],
)
def test_the_record_it_shows_makes_the_model_loadable(
    make: Any, inputs: dict[str, Any] | None, nearest: str | None, has: list[str]
) -> None:
    model = make().eval()
    said = refused(model)
    assert f"No family covers transformers:{type(model).__name__}." in said
    assert "mm_adapters/families/README.md" in said
    if nearest is not None:
        assert repr(nearest) in said.split("The nearest ")[1].split(":")[0]
    pasted(said)
    found = mm.wrap(model)
    assert set(has) <= set(found.sitemap.sites)
    assert "check" in said.lower()
    if inputs is None:
        return
    with torch.no_grad():
        plain = found(**inputs)[0].clone()
    run = found.run(inputs, read=list(found.sitemap.sites))
    assert run.values.keys() == found.sitemap.sites.keys()  # Each of its paths is one that runs.
    moved = found.run(inputs, edit=[mm.Edit(has[0], lambda x: 1.5 * x + 0.1)]).output[0]
    assert not torch.equal(moved, plain)


def test_a_folder_shows_the_same_record_before_its_weights_are_read(tmp_path: Path) -> None:
    model = hf.ViTMSNModel(hf.ViTMSNConfig(**_VISION))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # It would be refused for that.
    with pytest.raises(mm.UnknownFamilyError) as raised:
        mm.load(tmp_path)
    assert str(raised.value) == refused(model)


@pytest.mark.parametrize("whole", [False, True])
def test_a_class_and_its_classifier_come_with_one_another(whole: bool) -> None:
    config = hf.ViTMSNConfig(**_VISION, num_labels=3)
    body, classifier = hf.ViTMSNModel(config).eval(), hf.ViTMSNForImageClassification(config).eval()
    pasted(refused(classifier if whole else body))
    found = mm.wrap(classifier)
    assert found.kind == mm.wrap(body).kind == "tower"
    assert found.vision.W_Q.shape == (2, 3, 24, 8)
    with torch.no_grad():
        logits = classifier(PIXELS).logits
    torch.testing.assert_close(found.vision(PIXELS), logits)
    assert found.vision.projection.shape == (24, 3)


def test_a_record_says_where_to_rename_it_and_takes_no_name_that_is_taken() -> None:
    model = hf.ViTForMaskedImageModeling(hf.ViTConfig(**_VISION))
    said = refused(model)
    assert '"my_vit",  # rename it' in said  # A ViT has a record of that name.
    pasted(said)
    assert "vision.blocks.1.hook_mlp_out" in mm.wrap(model).sitemap.sites


def test_what_differs_between_stages_is_marked() -> None:
    said = refused(hf.DonutSwinModel(hf.DonutSwinConfig(**_WINDOWS)))
    assert '("encoder.layers.*.blocks.*",)' in said
    assert "attends within windows: shift_size, window_size. See Stages." in said
    assert "encoder.layers.*.downsample between stages" in said


def test_a_pipeline_shows_where_its_towers_hang() -> None:
    from diffusers import AutoencoderKL, DDPMScheduler, LDMTextToImagePipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    bert = hf.BertModel(hf.BertConfig(**_TEXT))
    pipe = LDMTextToImagePipeline(vae, bert, None, unet, DDPMScheduler())  # type: ignore[arg-type]
    said = refused(pipe)
    assert '"denoiser": TowerMount("unet")' in said
    pasted(said)
    assert "denoiser.blocks.0.cross_attn.hook_pattern" in mm.wrap(pipe).sitemap.sites


def test_a_timm_model_shows_its_fused_projections() -> None:
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    size = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = VisionTransformerRelPos(**size, num_classes=5).eval()
    said = refused(model)
    assert "timm:VisionTransformerRelPos" in said
    pasted(said)
    run = mm.wrap(model).run({"x": PIXELS}, read=["vision.blocks.1.attn.hook_q"])
    assert run["vision.blocks.1.attn.hook_q"].shape == (2, 4, 3, 8)


def test_what_has_no_blocks_gets_an_outline_and_the_nearest_names() -> None:
    said = refused(nn.Linear(2, 2))
    assert "The nearest by name are" in said
    pasted(said)
    assert _registry.find(_registry.ModelRecord, nn.Linear(2, 2)) is not None
