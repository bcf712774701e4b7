"""The families this package gives to TransformerLens' own bridge."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path

import pytest
import tiny
import torch
from transformer_lens.benchmarks.vision import run_vision_benchmarks
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

from integrations import transformer_lens as tl

ROOT = Path(__file__).parents[2]
CASES = {"clip": "vision_model", "siglip": "vision_model", "metaclip2": "vision_model",
         "altclip": "vision_model", "chinese_clip": "vision_model", "dinov2": ""}  # fmt: skip


def test_the_entry_points_are_the_adapters_and_none_of_them_is_transformer_lens_own() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["transformer_lens.architectures"]
    assert points.keys() == tl.RECORDS.keys()
    assert not points.keys() & SUPPORTED_ARCHITECTURES.keys()
    for name, where in points.items():
        module, _, attribute = where.partition(":")
        assert module == tl.__name__
        assert getattr(tl, attribute).record_name == tl.RECORDS[name]


@pytest.mark.parametrize("name", CASES)
def test_a_bridge_computes_what_the_model_does_and_passes_transformer_lens_benchmarks(name: str) -> None:
    case = tiny.CASES[name]()
    tower = case.model.get_submodule(CASES[name])
    pixels = case.inputs["pixel_values"]
    with torch.no_grad():
        want = tower(pixel_values=pixels).last_hidden_state
        bridge = tl.bridge(copy.deepcopy(tower))
        got, cache = bridge.run_with_cache(pixels)
    got = getattr(got, "last_hidden_state", got)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert cache["blocks.1.attn.hook_z"].shape[1] == cache["blocks.0.hook_resid_pre"].shape[1]
    results = run_vision_benchmarks(bridge, pixels, verbose=False)
    assert results
    assert not [r for r in results if r.severity.name in ("ERROR", "DANGER") and not r.passed], results


def test_a_class_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="CLIPVisionModel"):
        tl.bridge(torch.nn.Linear(2, 2))
