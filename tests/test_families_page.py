"""What mm_adapters/families/README.md says to write is run as it stands, on modules that have its paths."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny_case import Case, seeded
from torch import Tensor, nn

import mm_adapters as mm
from mm_adapters.records import registry as _registry

PAGE = (Path(mm.__file__).parent / "families" / "README.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)]


class _Attention(nn.Module):
    num_heads = 3

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out_proj(z.transpose(1, 2).flatten(2))


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), _Attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, 2 * width))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Embeddings(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Conv2d(3, width, 14, 14)
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.randn(1, 5, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embeddings.projection(pixel_values).flatten(2).mT
        row = self.class_embedding.expand(len(patches), -1, -1)
        return torch.cat([row, patches], 1) + self.position_embeddings


class MyVisionModel(nn.Module):
    __module__ = "transformers.models.mine"

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config.hidden_size)
        self.encoder = nn.Module()
        layers = [_Layer(config.hidden_size) for _ in range(config.num_hidden_layers)]
        self.encoder.layers = nn.ModuleList(layers)
        self.post_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Any:
        x = self.embeddings(pixel_values)
        for layer in self.encoder.layers:  # type: ignore[union-attr]
            x = layer(x)
        x = self.post_norm(x)
        return SimpleNamespace(last_hidden_state=x, pooler_output=x[:, 0])


class MyModel(nn.Module):
    __module__ = "transformers.models.mine"

    def __init__(self, vision: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.vision_model, self.text_model = vision, text
        self.visual_projection, self.text_projection = nn.Linear(24, 16), nn.Linear(24, 16)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(pixel_values).pooler_output)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.text_projection(self.text_model(input_ids, attention_mask=attention_mask).pooler_output)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        return self.get_image_features(pixel_values) @ self.get_text_features(input_ids, attention_mask).T


@pytest.fixture(scope="module")
def written() -> Any:
    """The page's blocks, run one after the other with nothing but the classes they are about."""
    mm.families.records()
    names: dict[str, Any] = {"MyVisionModel": MyVisionModel, "MyVisionConfig": SimpleNamespace, "Case": Case,
                             "seeded": seeded, "pixels": tiny.pixels}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registry, "_RECORDS", dict(_registry._RECORDS))
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), names)
        yield names


def test_the_page_shows_a_tower_mounts_and_a_builder() -> None:
    tower, model_record, builder = BLOCKS
    assert "Tower(" in tower
    assert "ModelRecord(" in model_record
    assert "-> Case" in builder


def test_its_tower_has_every_site_that_it_names_and_each_is_causal(written: Any) -> None:
    case = written["my_vision"]()
    model = mm.HookedModel(case.model)
    (tower,) = model.sitemap.towers.values()
    named = {*tower.record.stacks["blocks"].parts, *tower.record.before, *tower.record.after}
    assert named == {*tower.parts["blocks"][1], *tower.before, *tower.after}
    with torch.no_grad():
        plain = case.head(case.model(**case.inputs))
    for site in model.sitemap.sites:
        run = model.run(case.inputs, edit=[mm.Edit(site, lambda x: 1.5 * x + 0.1 * x.roll(1, -1))])
        assert (case.head(run.output) - plain).abs().max() > 1e-5, site
    assert model.vision.W_pos.shape == (5, 24)
    assert tower.record.n_class == 1


def test_its_mounts_join_that_tower_and_another(written: Any) -> None:
    vision, text = written["my_vision"]().model, tiny.CASES["clip_text"]().model
    model = mm.HookedModel(seeded(lambda: MyModel(vision, text)))
    assert model.tower_names == ["vision", "text"]
    inputs = {"pixel_values": tiny.pixels(), **tiny.clip_text_ids()}
    run = model.run(inputs, read=["vision.blocks.1.hook_resid_post", "text.blocks.1.attn.hook_pattern"])
    assert run.output.shape == (2, 2)
    torch.testing.assert_close(model.vision(tiny.pixels()), model.wrapped.get_image_features(tiny.pixels()))
