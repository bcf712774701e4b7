"""daam 0.2.0 and attention-map-diffusers 1.0.0, by the table that `tests.parity.cross_attention` wrote."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.cross_attention import word_maps
from tests.parity import cross_attention as peers


@pytest.fixture(scope="module")
def table() -> dict[str, Tensor]:
    return load_file(peers.TABLE)


@pytest.fixture(scope="module")
def model() -> mm.HookedModel:
    return mm.HookedModel(peers.pipeline())


def inputs() -> dict[str, Any]:
    return {**peers.INPUTS, "prompt": peers.PROMPT, "seed": 0, "height": 512, "width": 512}


def test_the_daam_recipe_equals_the_daam_package(table: dict[str, Tensor], model: mm.HookedModel) -> None:
    model.wrapped.vae_scale_factor = 8
    maps, _ = word_maps(model, inputs(), words="tokens", keep=("head",))
    assert maps.latent == (64, 64)
    ours = peers.sampled(maps.at("daam")[0])
    assert ours.shape == table["daam"].shape
    assert float((ours - table["daam"]).abs().max()) < 1e-5
    assert float(table["daam"].std()) > 1e-3


def test_every_record_equals_attention_map_diffusers(table: dict[str, Tensor]) -> None:
    lens = mm.HookedModel(peers.small_pipeline())
    sites = [s for s in lens.sites("denoiser.*cross_attn.hook_pattern") if s.reason is None]
    given = inputs() | {"height": 16, "width": 24}
    run = lens.run(given, read=[mm.Read(s.name, rows="cond") for s in sites])
    records = {k: v for k, v in table.items() if k != "daam"}
    assert len(records) == len(sites) * peers.INPUTS["num_inference_steps"]
    for site in sites:
        module = site.module.removeprefix("unet.")
        for step, pattern in enumerate(run[site.name]):
            (peer,) = (v for k, v in records.items() if k.endswith(f"{module}/{step}"))
            torch.testing.assert_close(pattern[0, :, ::4].float(), peer, rtol=0, atol=1e-6)
