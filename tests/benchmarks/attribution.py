"""Gradient features beside traker's own path, and scores of a large store in constant memory.

python -m tests.benchmarks.attribution [--rounds 3] [--small]

Featurising: a tiny UNet (all parameters), 10 timesteps an example, the same width of
projection, one thread. traker's path is its own TRAKer with its BasicProjector (on a GPU its CUDA one)
and an output function that averages over the timesteps; ours writes a store. Scoring: 100 queries
against stored random features by TRAK; the most memory that tensors have at once, by torch's own count,
is the same for two sizes of store.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from methods_multimodal.data_attribution import Task, denoiser_task
from methods_multimodal.data_attribution.features import Features, featurise
from methods_multimodal.data_attribution.projection import Projection
from methods_multimodal.data_attribution.scorers import top_k
from methods_multimodal.data_attribution.trak import Trak
from mm_adapters.store import Column, Store, Writer
from tests.benchmarks._memory import peak
from tests.benchmarks._paired import paired

SIZES = {"examples": (8, 32, 128), "dim": 2048, "few": 10_000, "many": 100_000, "features": 512}
SMALL = {"examples": (8,), "dim": 2048, "few": 10_000, "many": 50_000, "features": 128}
LIMITS = {"examples per second, ours / traker": 2.0, "growth in MB": 0.0}
N_STEPS = 10
# Examples that either makes at a time: a dense matrix is read once for all of them.
BATCH = 32


def denoiser(device: str) -> Task:
    """The tiny UNet, its loss at ten timesteps."""
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return denoiser_task(net.eval().to(device), DDPMScheduler(), timesteps=N_STEPS)


def ours(task: Task, examples: dict[str, Tensor], dim: int, kind: Any, folder: Path) -> Store:
    """Features into a new store."""
    shutil.rmtree(folder, ignore_errors=True)
    return featurise(
        task, examples, folder, projection=Projection(kind, dim), batch_size=BATCH, progress=False
    )


def traker(task: Task, examples: dict[str, Tensor], dim: int, folder: Path) -> None:
    """The same examples, timesteps and noise through TRAKer."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    n = len(examples["latents"])
    noised = task.rows({**examples, "index": torch.arange(n)}, range(N_STEPS))
    rows = [noised[k].unflatten(0, (n, N_STEPS)) for k in ("noisy", "target", "timestep")]

    class Output(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, *example: Tensor) -> Tensor:
            noisy, target, times = example
            out = torch.func.functional_call(model, (weights, buffers), (noisy, times)).sample
            return (out - target).square().mean()

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
            return torch.ones(len(batch[0]), 1, device=batch[0].device)

    shutil.rmtree(folder, ignore_errors=True)
    device = str(examples["latents"].device)
    made = TRAKer(
        model=task.module,
        task=Output(),
        train_set_size=n,
        save_dir=str(folder),
        device=device,
        proj_dim=dim,
        use_half_precision=False,
        logging_level=logging.ERROR,
    )
    made.load_checkpoint(task.module.state_dict(), model_id=0)
    for start in range(0, n, BATCH):
        batch = [r[start : start + BATCH] for r in rows]
        made.featurize(batch, num_samples=len(batch[0]))
    made.finalize_features()


def stored(folder: Path, n: int, width: int) -> None:
    """A store of random features."""
    made = torch.Generator().manual_seed(0)
    about = {
        "weights": ["none"], "parameters": "none", "projection": {"kind": "none"}, "draws": "mean",
        "blocks": [["all", 0, width]],
    }  # fmt: skip
    with Writer(folder, {"loss@0": Column((width,)), "value.loss@0": Column(())}, about) as writer:
        for start in range(0, n, 5000):
            count = min(5000, n - start)
            rows = torch.randn(count, width, generator=made)
            writer.append({"loss@0": rows, "value.loss@0": rows[:, 0]}, items=count)


def score(folder: Path) -> float:
    """The ten best of 100 queries; the most memory that tensors of it have at once, in MB."""
    store = Store(folder)
    asked = torch.randn(100, store.columns["loss@0"].shape[0], generator=torch.Generator().manual_seed(1))
    queries = Features({"loss@0": asked}, json.dumps(store.about))
    for _ in store.views(len(store)):
        pass  # What is mapped takes no memory, but is counted when it is mapped.
    return peak(lambda: top_k(Trak(), store, queries, 10)) / 2**20


def main(argv: list[str] | None = None) -> int:
    """Prints both tables; 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="fewer examples; only memory has a limit")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = SMALL if options.small else SIZES
    device = "cuda" if torch.cuda.is_available() else "cpu"
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder, task = Path(name), denoiser(device)
        n_parameters = sum(p.numel() for p in task.module.parameters())
        side = int((sizes["dim"] / 64) ** 0.5) ** 2
        widths = {"rademacher": sizes["dim"], "sparse": sizes["dim"], "factored": side}
        print(f"{N_STEPS} timesteps, {n_parameters} parameters, {device}, 1 thread")
        for count in sizes["examples"]:
            made = torch.Generator().manual_seed(0)
            examples = {"latents": torch.randn(count, 3, 16, 16, generator=made).to(device)}
            works = {
                kind: lambda k=kind, e=examples: ours(task, e, widths[k], k, folder / "a") for kind in widths
            }
            works["traker"] = lambda e=examples: traker(task, e, sizes["dim"], folder / "b")
            seconds = paired(works, options.rounds)
            own = statistics.median(seconds["traker"])
            print(f"  {count:4} examples: traker {count / own:6.1f} a second")
            for kind in widths:
                found = [a / b for a, b in zip(seconds["traker"], seconds[kind], strict=True)]
                times = statistics.median(found)
                print(f"    {kind:12} {times:6.1f} x ({min(found):.1f} to {max(found):.1f})", flush=True)
                failed |= not options.small and times < LIMITS["examples per second, ours / traker"]
        grown = []
        for count in (sizes["few"], sizes["many"]):
            stored(folder / str(count), count, sizes["features"])
            grown.append(score(folder / str(count)))
            print(f"  100 queries against {count:7} examples: {grown[-1]:7.1f} MB")
        failed |= grown[1] - grown[0] > LIMITS["growth in MB"]
    print("limits:", LIMITS, "missed" if failed else "met")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
