"""A stock service, which does not have this package: the same block, with our source sent along."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from zoo_inputs import INPUTS

import mm_adapters as mm
from mm_adapters import zoo
from mm_adapters.ndif_client.backend import Dispatch
from mm_adapters.ndif_client.shipping import sources
from mm_adapters.ndif_client.stock_service import stock_service_key
from mm_adapters.nnsight_engine.raw_values import raw_location

Load = Callable[[str], Any]


@pytest.fixture(scope="module")
def stock() -> Iterator[Any]:
    from tests.ndif.conftest import Standin

    server = Standin("--without", "mm_adapters")
    yield server
    server.kill()


@pytest.fixture(
    params=[
        "standin",
        pytest.param("trusted", marks=pytest.mark.ndif),
        pytest.param("sandbox", marks=pytest.mark.ndif),
    ]
)
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A service that serves nnsight's own classes only. The real one's package list is not asked for."""
    if request.param == "standin":
        return request.getfixturevalue("stock").host
    monkeypatch.setattr(Dispatch, "trusted", request.param == "trusted")
    monkeypatch.setattr(Dispatch, "on_stock_service", True)
    return request.getfixturevalue("service")


def test_the_key_is_that_of_nnsights_own_model(load: Load) -> None:
    key = stock_service_key(load("tiny-clip"))
    assert key.startswith("nnsight.modeling.transformers.TransformersModel:{")
    assert str(zoo.path("tiny-clip")) in key
    assert "zero-shot-image-classification" in key
    assert "image-text-to-text" in stock_service_key(load("tiny-llava"))
    assert stock_service_key(load("tiny-sd")).startswith("nnsight.modeling.diffusion.DiffusionModel:{")


def test_what_is_sent_along_is_source_and_small() -> None:
    files = sources()
    assert "mm_adapters/traced.py" in files
    assert not any("zoo" in name or "hooked" in name for name in files)
    # A job is sent compressed.
    assert len(zlib.compress("".join(files.values()).encode())) < 240_000


def test_only_a_modules_input_or_output_is_read_off_nnsights_values(load: Load) -> None:
    model = load("tiny-clip")

    def location(name: str) -> str:
        return raw_location("model", model.sitemap[name])

    layer = "model.vision_model.encoder.layers.1"
    assert location("vision.blocks.1.hook_resid_pre") == f"{layer}.input"
    assert location("vision.blocks.1.attn.hook_q") == f"{layer}.self_attn.q_proj.output"
    with pytest.raises(mm.AttentionUnreachableError, match="inside a fused call"):
        location("vision.blocks.1.attn.hook_pattern")
    # Each is made of two modules' values: a sum, and what is expanded to the rows of another.
    for name in ("vision.blocks.1.hook_resid_mid", "text.hook_pos_embed"):
        with pytest.raises(mm.MissingSiteError, match="computed from several values"):
            location(name)


def test_the_source_sent_along_imports_without_transformer_lens(tmp_path: Path) -> None:
    for name, text in sources().items():
        if name != "jaxtyping":
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
    script = """
    import sys
    sys.modules["transformer_lens"] = None  # Importing it fails.
    import pathlib, importlib, mm_adapters
    root = pathlib.Path(mm_adapters.__file__).parent
    assert str(root.parent) == sys.argv[1], root
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        importlib.import_module(name)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_clip(host: str, load: Load) -> None:
    model = load("tiny-clip")
    read = ["vision.blocks.1.attn.hook_z", "text.blocks.1.hook_resid_post"]
    edit = [mm.Edit("vision.blocks.0.attn.hook_q", lambda q: q * 2)]
    here = model.run(INPUTS["tiny-clip"], read=read, edit=edit)
    there = model.run(INPUTS["tiny-clip"], read=read, edit=edit, remote=host)
    for site in read:
        torch.testing.assert_close(here[site], there[site], rtol=1e-5, atol=1e-5)
    assert there.receipts[0].fired == 1
    torch.testing.assert_close(
        here.output.logits_per_image, there.output.logits_per_image, rtol=1e-5, atol=1e-5
    )


def test_a_pattern_is_reached_or_said_to_be_out_of_reach(host: str, load: Load) -> None:
    model, site = load("tiny-clip"), "vision.blocks.1.attn.hook_pattern"
    if Dispatch.trusted is False:
        with pytest.raises(mm.AttentionUnreachableError, match="Serve the model yourself"):
            model.run(INPUTS["tiny-clip"], read=[site], remote=host)
        return
    there = model.run(INPUTS["tiny-clip"], read=[site], remote=host)
    torch.testing.assert_close(model.run(INPUTS["tiny-clip"], read=[site])[site], there[site])


def test_a_generation_of_llava(host: str, load: Load) -> None:
    model = load("tiny-llava")
    options = INPUTS["tiny-llava"] | {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    site = "language.blocks.0.attn.hook_z"
    edit = [mm.Edit(site, lambda z: z * 3, positions=[2])]
    read = [mm.Read(site, reduce=lambda z: z[:, -1:])]
    here = model.generate(**options, read=read, edit=edit)
    there = model.generate(**options, read=read, edit=edit, remote=host)
    assert torch.equal(here.output, there.output)
    torch.testing.assert_close(here[site], there[site], rtol=1e-5, atol=1e-5)


def test_steps_of_stable_diffusion(host: str, load: Load) -> None:
    model = load("tiny-sd")
    site = next(s for s in model.sitemap.sites if s.endswith("cross_attn.hook_q"))
    edit = [mm.Edit("denoiser.hook_out", lambda x: x * 0.5, steps=[1])]
    here = model.run(INPUTS["tiny-sd"], read=[site], edit=edit)
    there = model.run(INPUTS["tiny-sd"], read=[site], edit=edit, remote=host)
    torch.testing.assert_close(here[site], there[site], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(here.output.images, there.output.images, rtol=1e-5, atol=1e-5)


def test_a_block_with_sites_and_native_paths(host: str, load: Load) -> None:
    model = load("tiny-clip")
    z, logits = torch.empty(0), torch.empty(0)
    with model.trace(**INPUTS["tiny-clip"], remote=host):
        z = model.site("vision.blocks.1.attn.hook_z").detach().clone().save()
        model.site("vision.blocks.2.attn.hook_z")[:] = 0
        logits = nnsight.save(model.output.logits_per_image.detach())
    edit = [mm.Edit("vision.blocks.2.attn.hook_z", torch.zeros_like)]
    here = model.run(INPUTS["tiny-clip"], read=["vision.blocks.1.attn.hook_z"], edit=edit)
    torch.testing.assert_close(here["vision.blocks.1.attn.hook_z"], z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(here.output.logits_per_image, logits, rtol=1e-5, atol=1e-5)
