"""Joint attention, guidance of both kinds, other pipelines of the same weights, adapters put on."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_diffusion as td
import torch

import mm_adapters as mm
from mm_adapters._attention import JointText, _by_rows, attend, attend_onto_text, fused


def read(case: tiny.Case, *sites: str, **more: Any) -> mm.Run:
    return mm.HookedModel(case.model).run(case.inputs | more, read=list(sites))


@pytest.mark.parametrize(
    ("name", "block", "first"),
    [("sd3_transformer", "blocks.1", "image"), ("flux_transformer", "blocks.0", "text"),
     ("flux_transformer", "single_blocks.0", "text")],
)  # fmt: skip
def test_the_text_part_of_a_joint_pattern_is_that_of_the_full_one(name: str, block: str, first: str) -> None:
    case = tiny.CASES[name]()
    site = f"denoiser.{block}.attn.hook_pattern"
    full, part = read(case, site)[site], read(case, f"{site}_text")[f"{site}_text"]
    n_text = case.inputs["encoder_hidden_states"].shape[1]
    text = slice(0, n_text) if first == "text" else slice(-n_text, None)
    image = slice(n_text, None) if first == "text" else slice(0, -n_text)
    torch.testing.assert_close(part, full[:, :, image, text], rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", ["sd3_transformer", "flux_transformer"])
def test_an_edit_of_the_text_part_is_that_edit_of_the_full_pattern(name: str) -> None:
    case = tiny.CASES[name]()
    model, site = mm.HookedModel(case.model), "denoiser.blocks.0.attn.hook_pattern"
    n_text = case.inputs["encoder_hidden_states"].shape[1]
    text_first = model.sitemap.towers["denoiser"].record.joint.first == "text"  # type: ignore[union-attr]

    def silence(pattern: torch.Tensor) -> torch.Tensor:
        text, image = JointText(n_text, text_first).split(pattern.shape[-1])
        new = pattern.clone()
        new[:, :, image, text] *= 0.25
        return new

    whole = model.run(case.inputs, edit=[mm.Edit(site, silence)])
    part = model.run(case.inputs, edit=[mm.Edit(f"{site}_text", lambda p: p * 0.25)])
    torch.testing.assert_close(case.head(part.output), case.head(whole.output), rtol=1e-5, atol=1e-6)


def test_the_full_pattern_is_never_formed_for_its_text_part(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny.CASES["flux_transformer"]()
    monkeypatch.setattr("mm_adapters._attention.attend", lambda *a, **k: pytest.fail("formed"))
    read(case, "denoiser.blocks.0.attn.hook_pattern_text", "denoiser.single_blocks.0.attn.hook_q")


@pytest.mark.parametrize("masked", [False, True])
def test_every_way_to_the_logsumexp_agrees(masked: bool) -> None:
    q, k, v = (torch.randn(2, 3, 700, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.zeros(700, 700).masked_fill(torch.rand(700, 700) < 0.2, -torch.inf) if masked else None
    scores = q.double() @ k.double().mT * 0.3 + (0 if mask is None else mask.double())
    for way in (fused, _by_rows):
        out, total = way(q, k, v, None if mask is None else mask.expand(2, 3, 700, 700), 0.3)
        torch.testing.assert_close(total.double(), scores.logsumexp(-1), rtol=0, atol=2e-5)
        torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), rtol=0, atol=2e-6)
    joint, shown = JointText(100, True), []
    note = lambda name, x: shown.append(x) or x  # noqa: E731
    z = attend_onto_text(note, q, k, v, mask, False, 0.3, joint)
    torch.testing.assert_close(shown[0].double(), scores.softmax(-1)[:, :, 100:, :100], rtol=0, atol=2e-6)
    torch.testing.assert_close(z, attend(lambda n, x: x, q, k, v, mask, scale=0.3), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux"])
def test_a_joint_layout_says_which_positions_are_text_and_which_latents(name: str) -> None:
    case = tiny.CASES[name]()
    model = mm.HookedModel(case.model)
    sizes = {k: case.inputs[k] for k in ("height", "width", "max_sequence_length")}
    layout = model.layout(text=["a cat", "a dog"], **sizes)["denoiser"]
    text_first = name == "flux"
    latents = layout.positions("latent")
    n_text = layout.n_pos - len(latents)
    assert latents == list(range(n_text, layout.n_pos) if text_first else range(len(latents)))
    assert layout.grid == ((2, 3) if text_first else (2, 2))
    site = "denoiser.blocks.0.attn.hook_pattern"
    run = model.run(case.inputs, read=[mm.Read(site, steps=[0]), mm.Read(f"{site}_text", steps=[0])])
    assert run[site].shape[-1] == layout.n_pos
    assert run[f"{site}_text"].shape[-2:] == (len(latents), n_text)
    # Words are found where the text is: once for each tower whose sequence is part of it.
    assert len(layout.where("cat", row=0)) == 3 * len(model.sitemap.mounts.joint_text)
    assert {layout.roles[0][p] for p in layout.where("a cat", row=0)} == {"word"}
    assert min(layout.where("cat")) < len(latents) if text_first else min(layout.where("cat")) >= len(latents)


# -- guidance ------------------------------------------------------------------------------------


def test_guidance_by_two_calls_counts_steps_and_tells_the_calls_apart() -> None:
    case = tiny.CASES["flux"]()
    model, site = mm.HookedModel(case.model), "denoiser.blocks.0.hook_text_resid_pre"
    both = model.run(case.inputs, read=[site])
    assert both[site].shape[:2] == (2, 4)  # Steps, then the prompts of both calls.
    assert both.rows["denoiser"] == {"cond": slice(0, 2), "uncond": slice(2, 4)}
    for which in ("cond", "uncond"):
        alone = model.run(case.inputs, read=[mm.Read(site, rows=which)])[site]
        torch.testing.assert_close(alone, both[site][:, both.rows["denoiser"][which]], rtol=0, atol=0)
    other = model.run(case.inputs | {"negative_prompt": ["x", "y"]}, read=[mm.Read(site, rows="cond")])
    torch.testing.assert_close(other[site][0], both[site][0, :2], rtol=0, atol=0)
    last = model.run(case.inputs, edit=[mm.Edit(site, torch.zeros_like, steps=[1], rows="uncond")])
    assert last.receipts[0].fired == 1
    plain = {k: v for k, v in case.inputs.items() if k not in ("negative_prompt", "true_cfg_scale")}
    assert model.run(plain, read=[site]).rows["denoiser"] == {"cond": slice(0, 2)}
    with pytest.raises(mm.EditNeverFiredError):
        model.run(plain, edit=[mm.Edit(site, torch.zeros_like, rows="uncond")])


@pytest.mark.parametrize(
    ("name", "first"), [("pixart", "uncond"), ("dit", "cond"), ("deepfloyd_if", "uncond")]
)
def test_guidance_that_only_an_argument_says_is_known(name: str, first: str) -> None:
    case = tiny.CASES[name]()
    model, site = mm.HookedModel(case.model), "denoiser.hook_in"
    guided = model.run(case.inputs, read=[site])
    assert guided[site].shape[:2] == (2, 4)
    assert guided.rows["denoiser"][first] == slice(0, 2)
    alone = model.run(case.inputs | {"guidance_scale": 1.0}, read=[mm.Read(site, rows="cond")])
    assert alone[site].shape[:2] == (2, 2)
    assert alone.rows["denoiser"] == {"cond": slice(None)}


# -- the same weights, elsewhere and with more on them ---------------------------------------------


@pytest.mark.parametrize("make", [td.image_to_image, td.inpainting])
def test_other_pipelines_of_the_same_weights_have_the_same_sites(make: Any) -> None:
    from mm_adapters.traced import TracedModel

    case = make()
    model, usual = mm.HookedModel(case.model), mm.HookedModel(tiny.CASES["stable_diffusion"]().model)
    assert list(model.sitemap.sites) == list(usual.sitemap.sites)
    sites = list(model.sitemap.sites)
    run, plain = model.run(case.inputs, read=sites), case.head(model(**case.inputs))
    assert set(run.values) == set(sites)
    torch.testing.assert_close(case.head(run.output), plain, rtol=0, atol=1e-5)
    some = [sites[len(sites) // 2], sites[-1], "denoiser.blocks.0.cross_attn.hook_pattern"]
    one, other = model.run(case.inputs, read=some), TracedModel(case.model).run(case.inputs, read=some)
    assert all(torch.equal(one[s], other[s]) for s in some)


def test_steps_of_an_autoencoder_count_its_decodings() -> None:
    case = tiny.CASES["stable_diffusion"]()
    model, site = mm.HookedModel(case.model), "vae.resnets.0.hook_out"
    every = model.run(case.inputs, read=[site])[site]
    assert torch.equal(model.run(case.inputs, read=[mm.Read(site, steps=[0])])[site], every)
    with pytest.raises(mm.EditNeverFiredError):
        model.run(case.inputs, edit=[mm.Edit(site, torch.zeros_like, steps=[1])])


def test_a_lora_is_part_of_what_its_layer_gives() -> None:
    from peft import LoraConfig

    case = tiny.CASES["unet"]()
    site = "denoiser.blocks.0.cross_attn.hook_q"
    before = read(case, site)[site]
    case.model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    model = mm.HookedModel(case.model.eval())
    after = read(case, site, "denoiser.blocks.0.hook_resid_mid", "denoiser.blocks.0.ln2.hook_normalized")
    layer = case.model.get_submodule(model.sitemap[site].module)
    want = layer(after["denoiser.blocks.0.ln2.hook_normalized"] * 1.0)
    assert not torch.allclose(after[site], before)
    assert want.shape[:2] == after[site].shape[:2]
    case.model.disable_adapters()
    assert torch.equal(read(case, site)[site], before)


def test_an_image_prompt_adapter_leaves_the_text_attention_its_own() -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    case = tiny.CASES["unet"]()
    site = "denoiser.blocks.0.cross_attn.hook_pattern"
    before = read(case, site)[site]
    name = mm.HookedModel(case.model).sitemap[site].module
    attention = case.model.get_submodule(name)
    hidden, text = attention.to_q.in_features, attention.to_k.in_features
    torch.manual_seed(0)
    attention.processor = IPAdapterAttnProcessor2_0(hidden, text, num_tokens=(3,), scale=0.5)
    inner, calls = attention.processor, []

    class WithImage(torch.nn.Module):  # A pipeline gives text and image embeddings as a pair.
        def __call__(self, attn: Any, hidden: Any, encoder_hidden_states: Any = None, **more: Any) -> Any:
            calls.append(1)
            image = torch.ones(len(hidden), 3, text)
            return inner(attn, hidden, (encoder_hidden_states, [image[:, None]]), **more)

    attention.processor = WithImage()
    model = mm.HookedModel(case.model)
    run = model.run(case.inputs, read=[site])
    assert calls
    torch.testing.assert_close(run[site], before, rtol=0, atol=1e-6)
    silent = model.run(case.inputs, edit=[mm.Edit(site, torch.zeros_like)])
    assert not torch.allclose(case.head(silent.output), case.head(run.output))
