"""SAELens' verbs on towers of every sort, against the same SAE as a plain hook; and what stays attached."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, Transcoder, TranscoderConfig
from sae_lens.saes.sae import SAEMetadata
from tiny import CASES

import mm_adapters as mm
from integrations import sae_lens as mm_sae
from mm_adapters import InputError, MissingSiteError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
BY_HEAD = {"reshape_activations": "hook_z"}
TEXTS = ["a red circle", "a blue square"]
TOWERS = {
    "tiny-clip vision": "blocks.1.attn.hook_z",
    "tiny-clip text": "blocks.1.hook_resid_post",
    "tiny-llava vision": "blocks.0.hook_mlp_out",
    "tiny-llava language": "blocks.1.attn.hook_z",
    "tiny-sd text": "blocks.0.hook_resid_mid",
}


def sae_at(site: str, d_in: int, **config: Any) -> Any:
    torch.manual_seed(3)
    made = StandardSAE(
        StandardSAEConfig(d_in=d_in, d_sae=2 * d_in, metadata=SAEMetadata(hook_name=site), **config)
    )
    torch.nn.init.normal_(made.b_enc, std=0.1)
    return made


def of_tower(name: str) -> tuple[Any, Any]:
    """A tower and an input of it."""
    model, tower = name.split()
    lens = mm.load(model)
    view = lens.tower(tower)
    torch.manual_seed(1)
    if tower == "vision":
        side = lens.wrapped.config.vision_config.image_size
        return view, torch.randn(2, 3, side, side)
    return view, view.to_tokens(TEXTS)


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_a_towers_verbs_do_as_a_hook_that_calls_the_sae(name: str) -> None:
    tower, given = of_tower(name)
    site = TOWERS[name]
    _, cache = tower.run_with_cache(given, names_filter=site)
    value = cache[site]
    by_head = BY_HEAD if site.endswith("hook_z") else {}
    sae = sae_at(site, value.shape[-1] * (value.shape[-2] if by_head else 1), **by_head)
    want = tower.run_with_hooks(given, fwd_hooks=[(site, lambda v, hook: sae(v))])
    assert torch.equal(tower.run_with_saes(given, saes=[sae]), want)
    assert not torch.equal(tower(given), want)
    out, spliced = tower.run_with_cache_with_saes(given, saes=[sae])
    assert torch.equal(out, want)
    assert torch.equal(spliced[f"{site}.hook_sae_acts_post"], sae.encode(value))
    assert torch.equal(spliced[site], sae(value))
    tower.add_sae(sae)
    assert tower.root.acts_to_saes == {f"{tower.name}.{site}": sae}
    assert tower.acts_to_saes == {site: sae}
    assert torch.equal(tower(given), want)
    tower.reset_saes()
    assert not torch.equal(tower(given), want)


@torch.no_grad()
@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_an_sae_by_head_is_spliced_and_scored_as_one_with_heads_side_by_side(engine: Any) -> None:
    case = CASES["clip"]()
    model = mm.wrap(case.model, engine=engine)
    site = "vision.blocks.1.attn.hook_z"
    by_head, flat = sae_at(site, 32, **BY_HEAD), sae_at(site, 32)
    runs = [
        model.run(case.inputs, edit=mm_sae.splice(model, sae, change=lambda acts: 2 * acts))
        for sae in (by_head, flat)
    ]
    assert torch.equal(case.head(runs[0].output), case.head(runs[1].output))
    value = model.run(case.inputs, read=[site])[site]
    assert by_head(value).shape == value.shape  # It is by head as before.


@torch.no_grad()
def test_an_sae_by_head_is_evaluated_and_shown(clip: Any, images: Any) -> None:
    site = "vision.blocks.1.attn.hook_z"
    width = clip.towers["vision"].weights(1).names("attn")["W_O"]()
    saes = [sae_at(site, width.shape[0] * width.shape[1], **more) for more in ({}, BY_HEAD)]
    reports = [mm_sae.evaluate(clip, sae, images[:8]) for sae in saes]
    assert reports[0] == reports[1]
    shown = [mm_sae.top_images(clip, sae, images[:8], latents=[3], n=2)[0] for sae in saes]
    assert torch.equal(shown[0].maps, shown[1].maps)


@torch.no_grad()
def test_what_is_added_to_a_pipeline_is_in_its_cache_at_every_step() -> None:
    model = mm.wrap(CASES["stable_diffusion"]().model)
    site = "denoiser.blocks.1.hook_resid_post"
    drawing = {"prompt": ["a cat"], "num_inference_steps": 3, "seed": 0, "output_type": "latent"}
    value = model.run(drawing, read=[site])[site]
    sae = sae_at(site, value.shape[-1])
    model.add_sae(sae, use_error_term=True)  # The loop goes the way that it goes without an SAE.
    latents = f"{site}.hook_sae_acts_post"
    for names in (None, latents, [latents], lambda name: name == latents):
        _, cache = model.run_with_cache(names_filter=names, **drawing)
        torch.testing.assert_close(cache[latents], sae.encode(value), rtol=1e-4, atol=1e-4)
        assert names is None or list(cache.keys()) == [latents]
    assert cache[latents].shape[0] == 3
    _, cache = model.run_with_cache(names_filter=latents, remove_batch_dim=True, **drawing)
    torch.testing.assert_close(cache[latents], sae.encode(value)[:, 0], rtol=1e-4, atol=1e-4)
    model.add_sae(sae, use_error_term=False)
    with pytest.raises(mm.ReadNeverFiredError, match="hook_sae_error"):
        model.run_with_cache(names_filter=f"{site}.hook_sae_error", **drawing)


@torch.no_grad()
def test_an_sae_stays_on_its_site_when_modules_are_replaced_and_says_so_when_the_site_is_lost() -> None:
    case = CASES["clip"]()
    model = mm.wrap(case.model)
    site = "vision.blocks.1.hook_mlp_out"
    sae = sae_at(site, 32)
    want = case.head(model.run_with_saes(saes=[sae], **case.inputs))
    layers = case.model.vision_model.encoder.layers
    model.add_sae(sae)
    layers[1].mlp = copy.deepcopy(layers[1].mlp)  # With the torch hooks that are on it.
    _, cache = model.run_with_cache(**case.inputs)
    assert f"{site}.hook_sae_acts_post" in cache
    assert "blocks.1.hook_mlp_out.hook_sae_acts_post" in model.vision.hook_dict
    assert torch.equal(case.head(model(**case.inputs)), want)
    del layers[1:]
    with pytest.raises(mm.ModelStateError, match=r"vision\.blocks\.1\.hook_mlp_out"):
        model(**case.inputs)
    model.reset_saes()
    assert model.acts_to_saes == {}
    case.head(model(**case.inputs))


@torch.no_grad()
def test_a_transcoder_reads_what_the_mlp_is_given() -> None:
    model = mm.load("tiny-llava")
    metadata = SAEMetadata(hook_name="blocks.1.mlp.hook_in", hook_name_out="blocks.1.hook_mlp_out")
    width = model.language.cfg.d_model
    torch.manual_seed(0)
    config = TranscoderConfig(
        d_in=width, d_sae=64, d_out=width, apply_b_dec_to_input=False, metadata=metadata
    )
    transcoder = Transcoder(config)
    seen: list[torch.Tensor] = []
    mlp = model.wrapped.model.language_model.layers[1].mlp
    handle = mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = model.language.to_tokens(TEXTS[0])
    _, cache = model.language.run_with_cache_with_saes(tokens, saes=[transcoder])
    handle.remove()
    torch.testing.assert_close(
        cache["blocks.1.hook_mlp_out.hook_sae_acts_post"], transcoder.encode(seen[0]), rtol=1e-5, atol=1e-5
    )
    model.add_sae(sae_at("language.blocks.1.hook_mlp_out", width))
    with pytest.raises(InputError, match="can be read and not written"):
        model.add_sae(sae_at("language.blocks.1.mlp.hook_in", width))
    with pytest.raises(MissingSiteError, match="hook_in"):
        model.add_sae(sae_at("vision.blocks.9.mlp.hook_in", width))


@torch.no_grad()
def test_special_tokens_are_left_out_of_the_whole_models_runs_and_of_its_generation() -> None:
    model = mm.load("tiny-llava")
    site = "language.blocks.1.hook_resid_post"
    sae = sae_at(site, model.language.cfg.d_model)
    ready = model.prepare(text=TEXTS)
    chosen = [int(ready["input_ids"][0, 2])]
    kept = (ready["input_ids"] == chosen[0])[..., None]
    want = model.run_with_hooks(
        fwd_hooks=[(site, lambda v, hook: torch.where(kept, v, sae(v)))], **ready
    ).logits
    model.add_sae(sae, exclude_special_tokens=chosen)
    assert torch.equal(model(**ready).logits, want)
    assert torch.equal(model(text=TEXTS).logits, want)
    assert torch.equal(model.language(ready["input_ids"], attention_mask=ready["attention_mask"]), want)
    greedy = {"max_new_tokens": 3, "do_sample": False}
    out = model.generate(text=TEXTS[:1], **greedy)
    step = out[:, :-1]
    assert int(model(input_ids=step).logits[0, -1].argmax()) == int(out[0, -1])
    model.reset_saes()
    hooks = [m._forward_pre_hooks for m in model.wrapped.modules()]
    assert not any(hooks)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("site", ["vision.blocks.1.hook_mlp_out", "vision.blocks.1.attn.hook_pattern"])
def test_a_copy_of_a_model_has_no_sae_and_no_hook(copied: Any, site: str) -> None:
    case = CASES["clip"]()
    model = mm.wrap(case.model)
    plain = case.head(model(**case.inputs))
    if site.endswith("pattern"):
        model.add_hook(site, halved, is_permanent=True)
    else:
        model.add_sae(sae_at(site, 32))
    hooked = case.head(model(**case.inputs))
    twin = copied(model)
    assert torch.equal(case.head(twin(**case.inputs)), plain)
    assert torch.equal(case.head(copied(case.model)(**case.inputs)), plain)
    assert twin.acts_to_saes == {}
    assert torch.equal(case.head(model(**case.inputs)), hooked)
    assert not torch.equal(hooked, plain)


def halved(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
    return pattern / 2
