"""SAE training: our BatchTopK step beside SAELens' own, and how busy a store keeps the trainer.

python -m tests.benchmarks.sae [--rounds 5] [--small]

The step is SAELens' whole one (forward, backward, clipping, Adam, statistics) at d_in 768, d_sae 6144,
k 32, batch 4096 (small: 512). Then, end to end: patches of a random ViT-B/32 through a store, and the
share of the training loop's time that is spent in the trainer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

import mm_adapters as mm
from integrations import sae_lens as mm_sae
from integrations.sae_lens._providers import FromStore
from tests.benchmarks._paired import paired, ratio
from tests.benchmarks.overhead import vit_b32

D_IN, D_SAE, K = 768, 6144, 32
LIMITS = {"step": 1.6, "busy": 0.9, "gradients": 1e-5}


def config() -> BatchTopKTrainingSAEConfig:
    return BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K)


def trainer_of(cls: type[BatchTopKTrainingSAE], batch: int, *, fused: bool) -> SAETrainer:
    torch.manual_seed(0)
    sae = cls(config())
    cfg = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=batch, lr_end=1e-4)
    one = SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))
    if fused:  # As mm_sae.train has it.
        for group in one.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
    return one


def rows(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(D_IN, D_IN, generator=generator) / D_IN**0.5
    return torch.randn(n, D_IN, generator=generator) @ mix


def step_ratio(batch: int, rounds: int) -> float:
    """Processor time of SAELens' step over that of ours."""
    x = rows(batch)
    slow = trainer_of(BatchTopKTrainingSAE, batch, fused=False)
    fast = trainer_of(mm_sae.FastBatchTopK, batch, fused=True)
    seconds = paired({"saelens": lambda: slow.step(x), "ours": lambda: fast.step(x)}, rounds)
    assert fast.sae.n_dense_steps == 0
    return ratio(seconds, "saelens", "ours")


def gradient_gap(batch: int) -> float:
    """The largest relative difference of a parameter's gradient."""
    x, grads = rows(batch), []
    for cls in (BatchTopKTrainingSAE, mm_sae.FastBatchTopK):
        torch.manual_seed(0)
        sae = cls(config())
        sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False)).loss.backward()
        grads.append({n: p.grad for n, p in sae.named_parameters()})
    return max(float((grads[1][n] - g).norm() / g.norm()) for n, g in grads[0].items())


def busy(n_images: int, batch: int, folder: Path) -> float:
    """The share of the loop's time spent in the trainer's step, not in waiting for rows."""
    model = mm.HookedModel(vit_b32())
    items = [{"pixel_values": picture} for picture in torch.randn(n_images, 3, 224, 224)]
    site = "vision.blocks.8.hook_resid_post"
    store = mm_sae.collect(model, site, items, folder / "s", tokens="patch", batch_size=8, progress=False)
    provider = FromStore(store, [site], batch, 0)
    one = trainer_of(mm_sae.FastBatchTopK, batch, fused=True)
    one.step(next(provider)[site])
    waiting = working = 0.0
    for _ in range(6):
        start = time.process_time()
        given = next(provider)[site]
        middle = time.process_time()
        one.step(given)
        waiting += middle - start
        working += time.process_time() - middle
    return working / (working + waiting)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="batches of 512")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    batch = 512 if options.small else 4096
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "gradients": gradient_gap(batch),
            "step": step_ratio(batch, options.rounds),
            "busy": busy(24 if options.small else 192, batch, Path(folder)),
        }
    ok = {
        name: value <= LIMITS[name] if name == "gradients" else value >= LIMITS[name]
        for name, value in found.items()
    }
    says = {"gradients": "largest relative gap", "step": "SAELens / ours", "busy": "in the trainer's step"}
    for name, value in found.items():
        verdict = "ok" if ok[name] else "MISSED"
        print(f"{name:<10} {value:10.3g}  {says[name]:<24} limit {LIMITS[name]}  {verdict}")
    return int(not all(ok.values()))


if __name__ == "__main__":
    sys.exit(main())
