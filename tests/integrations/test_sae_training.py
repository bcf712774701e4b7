"""Training on multimodal sites: SAELens' own numbers, and the same weights whatever interrupts it."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    AbsTopKTrainingSAEConfig,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LoggingConfig,
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from integrations import sae_lens as mm_sae
from mm_adapters import InputError, MissingSiteError, StoreError
from mm_adapters.store import Column, Store, Writer

SITE = "vision.blocks.1.hook_resid_post"
D = 16


def batchtopk(d_in: int = D, **options: Any) -> BatchTopKTrainingSAEConfig:
    return BatchTopKTrainingSAEConfig(**{"d_in": d_in, "d_sae": 4 * d_in, "k": 4} | options)


def trainer(steps: int = 24, size: int = 32, **options: Any) -> SAETrainerConfig:
    return SAETrainerConfig(
        **{
            "total_training_samples": steps * size,
            "train_batch_size_samples": size,
            "lr": 1e-2,
            "lr_end": 1e-3,
            "lr_warm_up_steps": 3,
            "lr_decay_steps": 6,
            "dead_feature_window": 5,
            "n_batches_for_norm_estimate": 3,
        }
        | options
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Rows of two sites of a made-up model: sparse sums of directions, and a linear map of them."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(24, D, generator=generator)
    codes = torch.rand(3000, 24, generator=generator) * (torch.rand(3000, 24, generator=generator) < 0.12)
    made = codes @ directions
    folder = tmp_path_factory.mktemp("rows") / "s"
    with Writer(folder, {SITE: Column((D,)), OUT: Column((8,))}, {"made": True}) as writer:
        writer.append({SITE: made, OUT: made @ torch.randn(D, 8, generator=generator)})
    return Store(folder)


OUT = "vision.blocks.2.hook_resid_post"
CONFIGS = [
    StandardTrainingSAEConfig(d_in=D, d_sae=64, l1_coefficient=0.1),
    GatedTrainingSAEConfig(d_in=D, d_sae=64, l1_coefficient=0.1),
    TopKTrainingSAEConfig(d_in=D, d_sae=64, k=4),
    AbsTopKTrainingSAEConfig(d_in=D, d_sae=64, k=4),
    JumpReLUTrainingSAEConfig(d_in=D, d_sae=64, l0_coefficient=0.1),
    batchtopk(normalize_activations="expected_average_only_in"),
    MatryoshkaBatchTopKTrainingSAEConfig(d_in=D, d_sae=64, k=4, matryoshka_widths=[16, 64]),
    MatchingPursuitTrainingSAEConfig(d_in=D, d_sae=64, max_iterations=4, decoder_init_norm=1.0),
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda c: c.architecture())
def test_every_architecture_trains_saves_and_explains_more_than_at_first(
    clip: Any, rows: Store, cfg: Any, tmp_path: Path
) -> None:
    sae = mm_sae.train(
        clip, SITE, cfg, data=rows, trainer=trainer(60), folder=tmp_path, log_every=10, progress=False
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    explained = [line["metrics/explained_variance"] for line in lines]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert explained[-1] > explained[0]
    loaded = SAE.load_from_disk(tmp_path / "sae")
    x = rows.rows(0, 50)[SITE]
    assert torch.equal(loaded(x), sae(x))
    assert loaded.cfg.metadata.hook_name == SITE
    assert loaded.cfg.metadata.tower == "vision"


def test_the_weights_are_those_of_saelens_own_fit(clip: Any, rows: Store, tmp_path: Path) -> None:
    cfg = batchtopk(normalize_activations="expected_average_only_in", aux_loss_coefficient=0.5)
    ours = mm_sae.train(
        clip, SITE, cfg, data=rows, trainer=trainer(), folder=tmp_path, fast=False, progress=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = BatchTopKTrainingSAE(
            batchtopk(normalize_activations="expected_average_only_in", aux_loss_coefficient=0.5)
        )
    batches = [b[SITE] for b in rows.batches(32, seed=0, columns=[SITE], drop_last=True)]
    # SAELens begins to train after the batches it estimated the scale from; we begin with them.
    provider = itertools.chain(batches[:3], batches)
    SAETrainer(cfg=trainer(), sae=sae, data_provider=provider).fit()
    sae.save_inference_model(tmp_path / "theirs")
    theirs = SAE.load_from_disk(tmp_path / "theirs")
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


@pytest.mark.parametrize("n_dead", [0, 40])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_sparse_step_has_saelens_loss_and_gradients(n_dead: int, rescale: bool, tied: bool) -> None:
    options = {
        "d_in": 48,
        "d_sae": 300,
        "k": 7,
        "rescale_acts_by_decoder_norm": rescale,
        "apply_b_dec_to_input": tied,
    }
    saes = []
    for cls in (BatchTopKTrainingSAE, mm_sae.FastBatchTopK):
        torch.manual_seed(1)
        sae = cls(BatchTopKTrainingSAEConfig(**options))
        with torch.no_grad():
            for p in sae.parameters():
                p.add_(0.1 * torch.randn_like(p))
        saes.append(sae)
    x = torch.randn(256, 48)
    dead = torch.arange(300) < n_dead
    slow, fast = (s.training_forward_pass(TrainStepInput(x, {}, dead, 0, False)) for s in saes)
    slow.loss.backward()
    fast.loss.backward()
    assert saes[1].n_dense_steps == 0
    torch.testing.assert_close(fast.loss, slow.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(fast.feature_acts.to_dense(), slow.feature_acts, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(saes[1].topk_threshold, saes[0].topk_threshold)
    for name, p in saes[0].named_parameters():
        found = saes[1].get_parameter(name).grad
        assert float((found - p.grad).norm() / p.grad.norm()) < 1e-5, name


def test_the_sparse_step_falls_back_when_candidates_overflow() -> None:
    cfg = BatchTopKTrainingSAEConfig(d_in=8, d_sae=64, k=1)
    sae = mm_sae.FastBatchTopK(cfg)
    # The sampled rows are the smallest: every bound made of them lets nearly everything through.
    x = torch.randn(1280, 8)
    x[::20] *= 1e-6
    plain = BatchTopKTrainingSAE(cfg)
    plain.load_state_dict(sae.state_dict())
    step = TrainStepInput(x, {}, None, 0, False)
    fast, slow = sae.training_forward_pass(step), plain.training_forward_pass(step)
    assert sae.n_dense_steps == 1
    assert torch.equal(fast.feature_acts, slow.feature_acts)
    assert torch.equal(fast.loss, slow.loss)


def test_few_positive_activations_are_all_kept() -> None:
    sae = mm_sae.FastBatchTopK(BatchTopKTrainingSAEConfig(d_in=8, d_sae=64, k=40))
    with torch.no_grad():
        sae.b_enc.fill_(-0.2)
    x = torch.randn(128, 8)
    plain = BatchTopKTrainingSAE(sae.cfg)
    plain.load_state_dict(sae.state_dict())
    step = TrainStepInput(x, {}, None, 0, False)
    fast, slow = sae.training_forward_pass(step), plain.training_forward_pass(step)
    assert sae.n_dense_steps == 0
    torch.testing.assert_close(fast.feature_acts.to_dense(), slow.feature_acts)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return SAE.load_from_disk(folder / "sae").state_dict()


def _same(a: Path, b: Path) -> None:
    for name, value in _weights(a).items():
        assert torch.equal(value, _weights(b)[name]), name
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()


class _Killer:
    """A store that sends its process a signal at one batch."""

    def __init__(self, store: Store, at: int, how: int) -> None:
        self.store, self.at, self.how = store, at, how
        self.n = 0

    def batches(self, *args: Any, **kwargs: Any) -> Any:
        for batch in self.store.batches(*args, **kwargs):
            self.n += 1
            if self.n == self.at:
                os.kill(os.getpid(), self.how)
            yield batch


def _train(clip: Any, rows: Store, folder: Path, at: int = 0, how: int = 0) -> None:
    if at:
        killer = _Killer(rows, at, how)
        rows = Store(rows.folder)
        rows.batches = killer.batches  # type: ignore[method-assign]
    mm_sae.train(
        clip,
        SITE,
        batchtopk(normalize_activations="expected_average_only_in"),
        data=rows,
        trainer=trainer(40),
        folder=folder,
        checkpoint_every=7,
        log_every=5,
        progress=False,
    )


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("at", [12, 26])
def test_kill_9_and_resume_give_the_same_weights(clip: Any, rows: Store, tmp_path: Path, at: int) -> None:
    _train(clip, rows, tmp_path / "whole")
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_train, args=(clip, rows, tmp_path / "cut", at, signal.SIGKILL))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "sae").exists()
    _train(clip, rows, tmp_path / "cut")
    _same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(("how", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_first(clip: Any, rows: Store, tmp_path: Path, how: int, error: type) -> None:
    _train(clip, rows, tmp_path / "whole")
    before = signal.getsignal(how)
    with pytest.raises(error):
        _train(clip, rows, tmp_path / "cut", 13, how)
    assert signal.getsignal(how) is before
    state = json.loads(
        sorted((tmp_path / "cut/checkpoints").iterdir())[-1].joinpath("state.json").read_text()
    )
    # Three batches were looked at for the scale, then trained on.
    assert state["trainers"][SITE]["n_training_steps"] == 10
    _train(clip, rows, tmp_path / "cut")
    _same(tmp_path / "whole", tmp_path / "cut")


def test_streaming_stopped_and_resumed_gives_the_same_weights(
    clip: Any, images: list[Any], tmp_path: Path
) -> None:
    def fit(folder: Path, evaluator: Any = None) -> None:
        mm_sae.train(
            clip,
            SITE,
            batchtopk(128),
            data=images,
            tokens="patch",
            on_disk=False,
            trainer=trainer(30, 128),
            folder=folder,
            checkpoint_every=4,
            log_every=1,
            evaluator=evaluator,
            batch_size=16,
            progress=False,
        )

    def stop(saes: Any) -> dict[str, float]:
        raise InterruptedError

    fit(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        fit(tmp_path / "cut", stop)
    fit(tmp_path / "cut")
    _same(tmp_path / "whole", tmp_path / "cut")


def test_an_evaluator_is_called_and_its_numbers_are_kept(clip: Any, rows: Store, tmp_path: Path) -> None:
    seen = []

    def evaluator(saes: Any) -> dict[str, float]:
        seen.append(saes[SITE].training)
        return {"mine": float(len(seen))}

    mm_sae.train(
        clip,
        SITE,
        batchtopk(),
        data=rows,
        trainer=trainer(40),
        folder=tmp_path,
        log_every=2,
        evaluator=evaluator,
        progress=False,
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["mine"] for line in lines if "mine" in line] == [1.0, 2.0]
    assert seen == [False, False]


def test_several_sites_and_a_transcoder_train_from_one_pass(
    clip: Any, images: list[Any], tmp_path: Path
) -> None:
    several = mm_sae.train(
        clip,
        [SITE, OUT],
        batchtopk(128),
        data=images[:24],
        tokens="patch",
        trainer=trainer(20, 64),
        folder=tmp_path / "several",
        progress=False,
    )
    assert list(several) == [SITE, OUT]
    assert not torch.equal(several[SITE].W_dec, several[OUT].W_dec)
    alone = mm_sae.train(
        clip,
        SITE,
        batchtopk(128),
        data=images[:24],
        tokens="patch",
        trainer=trainer(20, 64),
        folder=tmp_path / "alone",
        progress=False,
    )
    assert torch.equal(several[SITE].W_dec, alone.W_dec)
    both = f"{SITE} -> {OUT}"
    cfg = mm_sae.BatchTopKTranscoderConfig(d_in=128, d_out=128, d_sae=256, k=8)
    transcoder = mm_sae.train(
        clip,
        both,
        cfg,
        data=images[:24],
        tokens="patch",
        trainer=trainer(150, 64),
        folder=tmp_path / "t",
        progress=False,
    )
    store = Store(tmp_path / "t" / "activations").rows()
    x, y = store[SITE], store[OUT]
    assert transcoder.cfg.architecture() == "jumprelu_transcoder"
    assert transcoder.cfg.metadata.hook_name_out == OUT
    left = (transcoder(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert left < 0.6


def test_a_transcoder_learns_a_planted_map(clip: Any, rows: Store, tmp_path: Path) -> None:
    cfg = mm_sae.BatchTopKTranscoderConfig(d_in=D, d_out=8, d_sae=64, k=6)
    found = mm_sae.train(
        clip, f"{SITE} -> {OUT}", cfg, data=rows, trainer=trainer(600), folder=tmp_path, progress=False
    )
    x, y = (rows.rows()[n] for n in (SITE, OUT))
    left = (found(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert left < 0.1


def test_wandb_gets_the_metrics_if_asked(clip: Any, rows: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "run", object())
    monkeypatch.setattr(wandb, "log", lambda row, step: sent.append(row | {"step": step}))
    cfg = trainer(20, logger=LoggingConfig(log_to_wandb=True))
    mm_sae.train(clip, SITE, batchtopk(), data=rows, trainer=cfg, log_every=10, progress=False)
    assert [row["step"] for row in sent] == [10, 20]
    assert "metrics/explained_variance" in sent[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": iter([torch.zeros(32, D)] * 3)}, "ended after 96 rows and training takes 768"),
        ({"data": iter([torch.zeros(32, 4, D)])}, r"shape \(32, 4, 16\); it gives \[row, d_in\]"),
        ({"data": iter([torch.zeros(32, D, dtype=torch.int64)])}, "gave torch.int64"),
        ({"data": iter([{"x": 1}])}, "gave a dict"),
        ({"data": torch.zeros(32, D)}, "iterator of tensors"),
        ({"trainer": trainer(lr_end=None)}, "lr_end is None"),
        ({"cfg": batchtopk(normalize_activations="layer_norm")}, "do not go together"),
        ({"cfg": TopKTrainingSAEConfig(d_in=D, d_sae=32, k=2, use_sparse_activations=True)}, "on a CPU"),
        (
            {"cfg": TopKTrainingSAEConfig(d_in=D, d_sae=32, k=2, normalize_activations="layer_norm")},
            "do not go",
        ),
        ({"cfg": batchtopk(17)}, "has rows of 16 and the config says d_in=17"),
        ({"trainer": trainer(4, 4000)}, "less than one batch"),
        ({"site": f"{SITE} -> {OUT}"}, "BatchTopKTranscoderConfig"),
        ({"site": "vision.blocks.1.attn.hook_pattern"}, "one vector a position"),
    ],
)
def test_what_cannot_be_trained_is_said(
    clip: Any, rows: Store, options: dict[str, Any], message: str
) -> None:
    given = {"site": SITE, "cfg": batchtopk(), "data": rows, "trainer": trainer()} | options
    with pytest.raises(InputError, match=message):
        mm_sae.train(clip, progress=False, **given)


def test_an_unknown_site_or_other_training_is_an_error(clip: Any, rows: Store, tmp_path: Path) -> None:
    with pytest.raises(MissingSiteError, match="nearest"):
        mm_sae.train(clip, "vision.blocks.1.hook_resid_pots", batchtopk(), data=rows, progress=False)
    _train(clip, rows, tmp_path)
    with pytest.raises(StoreError, match=r"holds work of something else: .*seed"):
        mm_sae.train(
            clip,
            SITE,
            batchtopk(normalize_activations="expected_average_only_in"),
            data=rows,
            trainer=trainer(40),
            folder=tmp_path,
            seed=1,
            progress=False,
        )
