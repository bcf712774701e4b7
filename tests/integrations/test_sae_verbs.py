"""SAELens' verbs by value: on sampling loops, with one name as a string, with several SAEs; training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import TrainStepInput
from tiny import CASES

import mm_adapters as mm
from integrations import sae_lens as mm_sae
from integrations.sae_lens._transcoder import BatchTopKTranscoder, BatchTopKTranscoderConfig
from mm_adapters.store import Store

LOOPED, TEXT = "denoiser.blocks.1.hook_resid_post", "text.blocks.0.hook_resid_post"
TWO = ("vision.blocks.1.hook_resid_post", "text.blocks.0.hook_resid_post")


def sae_at(site: str, d_in: int, d_sae: int = 24) -> Any:
    torch.manual_seed(3)
    made = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae))
    made.cfg.metadata.hook_name = site
    return made


def hooks_of(model: Any) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def drawing() -> dict[str, Any]:
    return {"prompt": ["a cat"], "num_inference_steps": 3, "seed": 0, "output_type": "latent"}


@torch.no_grad()
def test_latents_of_a_loop_have_a_step_axis_and_those_of_its_text_have_none() -> None:
    model = mm.wrap(CASES["stable_diffusion"]().model)
    plain = model.run(drawing(), read=[LOOPED, TEXT])
    saes = [sae_at(site, plain[site].shape[-1]) for site in (LOOPED, TEXT)]
    # With the error term the loop goes the way that it goes without an SAE.
    _, cache = model.run_with_cache_with_saes(saes=saes, use_error_term=True, **drawing())
    for site, sae in zip((LOOPED, TEXT), saes, strict=True):
        found = cache[f"{site}.hook_sae_acts_post"]
        assert found.shape == (*plain[site].shape[:-1], 24)
        torch.testing.assert_close(found, sae.encode(plain[site]), rtol=1e-4, atol=1e-4)
    assert plain[LOOPED].shape[0] == 3


@torch.no_grad()
@pytest.mark.parametrize("one_name", [True, False])
def test_one_name_may_be_a_string_wherever_a_list_is_taken(one_name: bool) -> None:
    case = CASES["clip"]()
    model = mm.wrap(case.model)
    _, plain = model.run_with_cache(**case.inputs)
    saes = [sae_at(site, plain[site].shape[-1]) for site in TWO]
    latents = f"{TWO[0]}.hook_sae_acts_post"
    only = latents if one_name else [latents]
    _, cache = model.run_with_cache_with_saes(saes=saes, names_filter=only, **case.inputs)
    assert list(cache.keys()) == [latents]
    assert torch.equal(cache[latents], saes[0].encode(plain[TWO[0]]))
    both = [latents, TWO[1]]
    _, cache = model.run_with_cache_with_saes(saes=saes, names_filter=both, **case.inputs)
    assert set(cache.keys()) == set(both)
    model.add_sae(saes[0])
    model.add_sae(saes[1])
    assert list(model.acts_to_saes) == list(TWO)
    model.reset_saes(TWO[0] if one_name else [TWO[0]])
    assert list(model.acts_to_saes) == [TWO[1]]
    _, cache = model.run_with_cache(**case.inputs)
    assert torch.equal(cache[TWO[0]], plain[TWO[0]])
    assert torch.equal(cache[TWO[1]], saes[1](plain[TWO[1]]))
    model.reset_saes()
    assert not model.acts_to_saes


def test_a_hook_may_stand_on_a_site_and_on_an_sae_at_once() -> None:
    case = CASES["clip"]()
    model = mm.wrap(case.model)
    site = TWO[0]
    value = model.run(case.inputs, read=[site])[site]
    sae = sae_at(site, value.shape[-1])
    seen: dict[str, torch.Tensor] = {}

    def twice(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        return 2 * acts

    def note(x: torch.Tensor, hook: Any) -> None:
        seen["after"] = x.detach().clone()

    later = "vision.blocks.2.hook_resid_pre"
    out = model.run_with_hooks_with_saes(
        saes=[sae], fwd_hooks=[(f"{site}.hook_sae_acts_post", twice), (later, note)], **case.inputs
    )
    want = sae.decode(2 * sae.encode(value)).detach()
    torch.testing.assert_close(seen["after"], want, rtol=1e-5, atol=1e-5)
    edited = model.run(case.inputs, edit=[mm.Edit(site, lambda _: want)]).output
    torch.testing.assert_close(case.head(out), case.head(edited), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_saes_that_are_kept_at_the_end_stay() -> None:
    case = CASES["clip"]()
    model = mm.wrap(case.model)
    value = model.run(case.inputs, read=[TWO[0]])[TWO[0]]
    sae = sae_at(TWO[0], value.shape[-1])
    before = hooks_of(case.model)
    spliced = case.head(model.run_with_saes(saes=sae, reset_saes_end=False, **case.inputs))
    assert model.acts_to_saes == {TWO[0]: sae}
    assert torch.equal(case.head(model(**case.inputs)), spliced)
    assert hooks_of(case.model) != before
    model.reset_saes(TWO[0])
    assert not torch.equal(case.head(model(**case.inputs)), spliced)
    assert hooks_of(case.model) == before


@torch.no_grad()
@pytest.mark.parametrize("mode", ["add", "clamp", "ablate"])
def test_a_steered_value_is_decoded_from_its_changed_latent_at_the_masked_positions(mode: Any) -> None:
    case = CASES["clip"]()
    model = mm.wrap(case.model)
    value = model.run(case.inputs, read=[TWO[0]])[TWO[0]]
    sae = sae_at(TWO[0], value.shape[-1])
    mask = torch.zeros(value.shape[:2], dtype=torch.bool)
    mask[0, 1] = mask[1, 2:] = True
    edits = mm_sae.steer(model, sae, 5, mode, 0.7, mask=mask)
    found = model.run(case.inputs, read=["vision.blocks.2.hook_resid_pre"], edit=edits)
    acts = sae.encode(value)[..., 5]
    move = {"add": torch.full_like(acts, 0.7), "clamp": 0.7 - acts, "ablate": -acts}[mode]
    want = value + torch.where(mask, move, 0.0)[..., None] * sae.W_dec[5]
    torch.testing.assert_close(found["vision.blocks.2.hook_resid_pre"], want, rtol=1e-4, atol=1e-5)


# ---- what trains and what is exchanged -----------------------------------------------------------


@pytest.mark.parametrize("n_rows", [1, 6])
def test_a_transcoders_loss_is_the_mean_over_rows_of_the_squared_error(n_rows: int) -> None:
    cfg = BatchTopKTranscoderConfig(d_in=4, d_sae=10, d_out=3, k=2, device="cpu", topk_threshold_lr=0.25)
    torch.manual_seed(0)
    found = BatchTopKTranscoder(cfg)
    rows = torch.randn(n_rows, 7)
    step = TrainStepInput(
        sae_in=rows, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )
    out = found.training_forward_pass(step)
    norms = found.W_dec.norm(dim=1)
    pre = (rows[:, :4] @ found.W_enc + found.b_enc) * norms
    kept = pre.relu().flatten()
    kept[kept.argsort(descending=True)[2 * n_rows :]] = 0
    acts = kept.view(n_rows, 10)
    recons = (acts / norms) @ found.W_dec + found.b_dec
    torch.testing.assert_close(out.feature_acts, acts)
    torch.testing.assert_close(out.loss, (recons - rows[:, 4:]).pow(2).sum() / n_rows)
    assert torch.equal(out.sae_in, rows[:, 4:])
    lowest = acts[acts > 0].min()
    torch.testing.assert_close(found.topk_threshold.float(), 0.25 * lowest)
    found.training_forward_pass(step)
    torch.testing.assert_close(found.topk_threshold.float(), (0.75 * 0.25 + 0.25) * lowest)


@pytest.mark.parametrize("n_contexts", [1, 64, 65, 130])
def test_every_cached_context_comes_back_once(n_contexts: int, tmp_path: Path) -> None:
    from datasets import Array2D, Dataset, Features

    values = torch.arange(n_contexts * 3 * 2, dtype=torch.float32).view(n_contexts, 3, 2)
    features = Features({"site": Array2D(shape=(3, 2), dtype="float32")})
    Dataset.from_dict({"site": values.numpy()}, features=features).save_to_disk(str(tmp_path / "data"))
    store = mm_sae.import_cached(tmp_path / "data", tmp_path / "store")
    assert torch.equal(store.rows()["site"], values.flatten(0, 1))
    assert torch.equal(Store(tmp_path / "store").rows()["site"], values.flatten(0, 1))
