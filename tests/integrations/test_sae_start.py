"""Where training starts: the decoder's bias at the rows' mean, if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

from integrations import sae_lens as mm_sae
from mm_adapters import StoreError
from mm_adapters.store import Column, Store, Writer

SITE, OUT = "vision.blocks.1.hook_resid_post", "vision.blocks.2.hook_resid_post"
D = 16


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Rows of two sites that lie around a point far from zero."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("rows") / "s"
    with Writer(folder, {SITE: Column((D,)), OUT: Column((8,))}, {"made": True}) as writer:
        far = torch.randn(2, D, generator=generator) * 10
        made = torch.randn(4096, D, generator=generator) * (torch.rand(4096, D, generator=generator) < 0.1)
        writer.append({SITE: made + far[0], OUT: made[:, :8] + far[1, :8]})
    return Store(folder)


def trainer(steps: int, lr: float) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=steps * 512,
        train_batch_size_samples=512,
        lr=lr,
        lr_end=lr / 10,
        lr_warm_up_steps=20,
        lr_decay_steps=20,
        dead_feature_window=1000,
        n_batches_for_norm_estimate=8,
    )


@pytest.mark.parametrize("normalise", ["none", "expected_average_only_in", "covariance_whitening"])
def test_the_bias_starts_at_the_mean_whatever_normalises_the_rows(
    clip: Any, rows: Store, tmp_path: Path, normalise: Any
) -> None:
    cfg = BatchTopKTrainingSAEConfig(d_in=D, d_sae=64, k=2, normalize_activations=normalise)
    sae = mm_sae.train(
        clip, SITE, cfg, data=rows, trainer=trainer(1, 1e-12), folder=tmp_path, centre=True, progress=False
    )
    # Eight batches of 512 are all rows, once each; what normalises is folded in by now.
    torch.testing.assert_close(sae.b_dec.data, rows.rows()[SITE].mean(0), rtol=0, atol=1e-4)


def test_a_transcoders_bias_starts_at_the_mean_of_what_it_gives(clip: Any, rows: Store) -> None:
    cfg = mm_sae.BatchTopKTranscoderConfig(d_in=D, d_sae=64, d_out=8, k=2)
    made = mm_sae.train(
        clip, f"{SITE} -> {OUT}", cfg, data=rows, trainer=trainer(1, 1e-12), centre=True, progress=False
    )
    torch.testing.assert_close(made.b_dec.data, rows.rows()[OUT].mean(0), rtol=0, atol=1e-4)


def test_far_from_zero_more_latents_live(clip: Any, rows: Store) -> None:
    x = rows.rows()[SITE]
    live = {}
    for centre in (False, True):
        cfg = BatchTopKTrainingSAEConfig(d_in=D, d_sae=128, k=2, aux_loss_coefficient=0.0)
        sae = mm_sae.train(
            clip, SITE, cfg, data=rows, trainer=trainer(150, 2e-3), centre=centre, progress=False
        )
        live[centre] = int((sae.encode(x) > 0).any(0).sum())
    assert live[True] > 1.5 * live[False], live


def test_it_is_part_of_what_a_checkpoint_goes_on_with(clip: Any, rows: Store, tmp_path: Path) -> None:
    cfg = BatchTopKTrainingSAEConfig(d_in=D, d_sae=64, k=2)
    options: dict[str, Any] = {"data": rows, "trainer": trainer(4, 1e-3), "folder": tmp_path}
    options |= {"checkpoint_every": 2, "progress": False}
    mm_sae.train(clip, SITE, cfg, centre=True, **options)
    with pytest.raises(StoreError, match="centre differ"):
        mm_sae.train(clip, SITE, cfg, **options)
