"""What mm_adapters/families/README.md says is done: its family is drafted, built, and keeps the contract."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_families
import test_traced
import tiny
import torch
import transformers as hf
from tiny_case import seeded
from torch import Tensor, nn

import mm_adapters as mm
from mm_adapters.records import registry

PAGE = (Path(mm.__file__).parent / "families" / "README.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)]
ASK, RECORD, MOUNTS, BUILDER = BLOCKS


class MyModel(nn.Module):
    __module__ = "transformers.models.mine"

    def __init__(self, vision: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.vision_model, self.text_model = vision, text
        self.visual_projection, self.text_projection = nn.Linear(24, 16), nn.Linear(24, 16)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(pixel_values).last_hidden_state[:, 0])

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.text_projection(self.text_model(input_ids, attention_mask=attention_mask).pooler_output)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        return self.get_image_features(pixel_values) @ self.get_text_features(input_ids, attention_mask).T


def run(block: str) -> dict[str, Any]:
    """A block pasted into a file of its own."""
    names: dict[str, Any] = {"__name__": "pasted"}
    exec(compile(block, "README.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def written() -> Iterator[dict[str, Any]]:
    """The page's blocks, each run by itself in their order; its builders are among the tiny models."""
    mm.families.records()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_RECORDS", dict(registry._RECORDS))
        run(RECORD)
        run(MOUNTS)
        built = run(BUILDER)
        for name in ("vit_msn", "vit_msn_classifier"):
            patch.setitem(tiny.CASES, name, built[name])
        yield built
    test_families.case.cache_clear()


def test_asking_shows_the_record_that_the_page_pastes(capsys: pytest.CaptureFixture[str]) -> None:
    run(ASK)
    said = capsys.readouterr().out
    assert "No family covers transformers:ViTMSNModel. The nearest are 'vit'" in said
    drafted = said.split("\n\n", 1)[1]
    assert ast.dump(ast.parse(drafted)) == ast.dump(ast.parse(RECORD))
    guessed = [line for line in drafted.splitlines() if "check" in line]
    assert len(guessed) == 4, guessed


def test_its_tower_has_every_site_that_it_names_and_each_is_causal(written: Any) -> None:
    case = written["vit_msn"]()
    model = mm.HookedModel(case.model)
    (tower,) = model.sitemap.towers.values()
    named = {*tower.record.stacks["blocks"].parts, *tower.record.before, *tower.record.after}
    assert named == {*tower.parts["blocks"][1], *tower.before, *tower.after}
    with torch.no_grad():
        plain = case.head(case.model(**case.inputs))
    for site in model.sitemap.sites:
        moved = model.run(case.inputs, edit=[mm.Edit(site, lambda x: 1.5 * x + 0.1 * x.roll(1, -1))])
        assert (case.head(moved.output) - plain).abs().max() > 1e-5, site
    assert model.vision.W_pos.shape == (5, 24)
    assert tower.record.n_class == 1


CONTRACT = [
    test_families.test_unhooked_forward_equals_the_original_bit_for_bit,
    test_families.test_every_site_fires_with_the_axes_it_declares,
    test_families.test_every_site_is_causal_and_leaves_nothing_behind,
    test_families.test_sites_are_listed_in_the_order_they_run,
    test_families.test_nothing_in_the_model_is_replaced,
    test_families.test_an_exception_inside_a_hook_leaves_the_model_clean,
    test_traced.test_every_site_read_is_bit_equal_to_the_hooked_model,
]


@pytest.mark.parametrize("name", ["vit_msn", "vit_msn_classifier"])
@pytest.mark.parametrize("rule", CONTRACT, ids=lambda rule: rule.__name__)
def test_its_builders_keep_the_contract(written: Any, rule: Any, name: str) -> None:
    rule(name)


def test_its_classifier_gives_logits_that_a_projection_reads_off_the_summary(written: Any) -> None:
    case = written["vit_msn_classifier"]()
    model = mm.wrap(case.model)
    assert model.kind == "tower"
    pixels = case.inputs["pixel_values"]
    normalised = model.vision.run_with_cache(pixels)[1]["ln_final.hook_normalized"][:, 0]
    final, head = model.vision.ln_final, case.model.classifier
    logits = (normalised * final.w + final.b) @ model.vision.projection + head.bias
    torch.testing.assert_close(logits, case.model(pixels).logits, rtol=1e-4, atol=1e-5)


def test_its_mounts_join_that_tower_and_another(written: Any) -> None:
    vision, text = written["vit_msn"]().model, tiny.CASES["clip_text"]().model
    assert isinstance(vision, hf.ViTMSNModel)
    model = mm.HookedModel(seeded(lambda: MyModel(vision, text)))
    assert model.tower_names == ["vision", "text"]
    inputs = {"pixel_values": tiny.pixels(), **tiny.clip_text_ids()}
    found = model.run(inputs, read=["vision.blocks.1.hook_resid_post", "text.blocks.1.attn.hook_pattern"])
    assert found.output.shape == (2, 2)
    torch.testing.assert_close(model.vision(tiny.pixels()), model.wrapped.get_image_features(tiny.pixels()))
