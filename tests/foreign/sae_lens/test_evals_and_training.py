"""SAELens' `run_evals` and its training runner on a tower, beside HookedTransformer on the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from foreign.sae_lens.pair import WIDTHS, ours, sae_at, theirs
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
)
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor

import mm_adapters as mm

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning"),
]
TEXTS = ["a red circle on white", "a blue square on green", "a green circle", "white on red square"]


def texts(n: int) -> Dataset:
    return Dataset.from_dict({"text": [" ".join([TEXTS[i % 4], TEXTS[(i // 4) % 4]]) for i in range(n)]})


def store(model: Any, site: str, width: int, layer: int = 0) -> ActivationsStore:
    return ActivationsStore(
        model=model, dataset=texts(700), streaming=False, hook_name=f"blocks.{layer}.{site}",
        hook_head_index=None, context_size=6, d_in=width, n_batches_in_buffer=8, total_training_tokens=600,
        store_batch_size_prompts=4, train_batch_size_tokens=8, prepend_bos=True, normalize_activations="none",
        device=torch.device("cpu"), dtype="float32",
    )  # fmt: skip


def evaluated(model: Any, site: str) -> Any:
    sae = sae_at(site)
    config = get_eval_everything_config(4, 3, 3)
    return run_evals(sae, store(model, site, WIDTHS[site]), model, ActivationScaler(), config)


def check_close(theirs: Any, ours: Any, where: str = "") -> None:
    assert type(theirs) is type(ours), where
    if isinstance(theirs, tuple):
        theirs, ours = dict(enumerate(theirs)), dict(enumerate(ours))
    if isinstance(theirs, dict):
        assert set(theirs) == set(ours), where
        for name in theirs:
            check_close(theirs[name], ours[name], f"{where}.{name}")
    else:
        torch.testing.assert_close(
            torch.as_tensor(ours),
            torch.as_tensor(theirs),
            rtol=1e-3,
            atol=1e-4,
            equal_nan=True,
            msg=lambda m: where + m,
        )


@pytest.mark.parametrize("site", WIDTHS)
def test_run_evals_gives_the_same_numbers(site: str) -> None:
    wanted = evaluated(theirs(), site)
    check_close(wanted, evaluated(ours(), site))
    assert 0 < wanted[0]["model_performance_preservation"]["ce_loss_with_sae"] < 20


def trained(model: Any, site: str, width: int) -> tuple[Any, Tensor, Any]:
    sae = StandardTrainingSAEConfig(
        d_in=width, d_sae=40, l1_coefficient=0.1, l1_warm_up_steps=0, device="cpu"
    )
    config = LanguageModelSAERunnerConfig(
        sae=sae, model_name="override", dataset_path="override", hook_name=site, context_size=6,
        streaming=False, lr=0.01, n_batches_in_buffer=8, training_tokens=640, store_batch_size_prompts=4,
        train_batch_size_tokens=16, device="cpu", act_store_device="cpu", output_path=None, n_checkpoints=0,
        eval_batch_size_prompts=4, n_eval_batches=2, is_dataset_tokenized=False, verbose=False,
        logger=LoggingConfig(log_to_wandb=False), seed=1,
    )  # fmt: skip
    torch.manual_seed(0)
    runner = LanguageModelSAETrainingRunner(config, override_dataset=texts(700), override_model=model)
    before = runner.sae.W_enc.detach().clone()
    torch.manual_seed(0)
    made = runner.run()
    metrics = runner.evaluator(made, runner.activations_store, ActivationScaler())
    return made, before, metrics


@pytest.mark.parametrize("site", ["blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"])
def test_the_training_runner_trains_the_same_sae(site: str) -> None:
    wanted, before, wanted_metrics = trained(theirs(), site, 24)
    made, _, metrics = trained(ours(), site, 24)
    check_close(dict(wanted.state_dict()), dict(made.state_dict()))
    assert not torch.allclose(before, wanted.W_enc)
    check_close(wanted_metrics, metrics)


def test_they_complete_on_tiny_llavas_language_tower() -> None:
    tower = mm.load("tiny-llava").language
    made, before, _ = trained(tower, "blocks.1.hook_resid_post", tower.cfg.d_model)
    assert made.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert not torch.allclose(before, made.W_enc)
    kept = store(tower, "hook_resid_post", tower.cfg.d_model, layer=1)
    config = get_eval_everything_config(4, 2, 2)
    metrics, of_latents = run_evals(made, kept, tower, ActivationScaler(), config)
    losses = metrics["model_performance_preservation"]
    again = store(tower, "hook_resid_post", tower.cfg.d_model, layer=1)
    parts = []
    for tokens in (again.get_batch_tokens(4), again.get_batch_tokens(4)):
        logits = tower.root.wrapped(input_ids=tokens).logits.log_softmax(-1)
        told = -logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        special = torch.isin(tokens, torch.tensor(get_special_token_ids(tower.tokenizer)))[:, :-1]
        parts.append(told[~special])
    assert losses["ce_loss_without_sae"] == pytest.approx(float(torch.cat(parts).mean().detach()), rel=1e-4)
    assert losses["ce_loss_with_sae"] != losses["ce_loss_without_sae"]
    assert metrics["sparsity"]["l0"] > 0
    assert len(of_latents["feature_density"]) == 40
