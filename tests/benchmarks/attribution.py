"""Gradient features beside traker's own path, and scores of a large store in constant memory.

python -m tests.benchmarks.attribution [--rounds 3] [--small]

Featurising: a tiny UNet (all parameters), 10 timesteps an example, the same width of
projection, one thread. traker's path is its own TRAKer with its BasicProjector (on a GPU its CUDA one)
and an output function that averages over the timesteps; ours writes a store. Scoring: 100 queries
against stored random features by TRAK; peak memory is read for two sizes of store, in processes of
their own, and must not grow with it by more than the scores asked for.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from methods_multimodal.data_attribution import Task, diffusion_task
from methods_multimodal.data_attribution.features import Features, featurise
from methods_multimodal.data_attribution.projection import Projection
from methods_multimodal.data_attribution.scorers import Dot, top_k
from methods_multimodal.data_attribution.trak import Trak
from mm_adapters.store import Column, Store, Writer
from tests.benchmarks._paired import paired, ratio

SIZES = {"examples": 64, "dim": 2048, "few": 10_000, "many": 100_000, "features": 512}
SMALL = {"examples": 32, "dim": 2048, "few": 5_000, "many": 50_000, "features": 128}
LIMITS = {"examples per second, ours / traker": 2.0, "growth in MB": 64.0}
N_STEPS = 10


def denoiser(device: str) -> Task:
    """The tiny UNet, its loss at ten timesteps."""
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusion_task(net.eval().to(device), scheduler=DDPMScheduler(), timesteps=N_STEPS)


def ours(task: Task, examples: dict[str, Tensor], dim: int, kind: Any, folder: Path) -> Store:
    """Features into a new store."""
    shutil.rmtree(folder, ignore_errors=True)
    return featurise(task, examples, folder, projection=Projection(kind, dim), batch_size=8, progress=False)


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
        model=task.module, task=Output(), train_set_size=n, save_dir=str(folder), device=device, proj_dim=dim,
        use_half_precision=False, logging_level=logging.ERROR,
    )  # fmt: skip
    made.load_checkpoint(task.module.state_dict(), model_id=0)
    for start in range(0, n, 8):
        made.featurize([r[start : start + 8] for r in rows], num_samples=len(rows[0][start : start + 8]))
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
    """The ten best of 100 queries; peak memory of it in MB, what lies on the disk left out."""
    store = Store(folder)
    asked = torch.randn(100, store.columns["loss@0"].shape[0], generator=torch.Generator().manual_seed(1))
    queries = Features({"loss@0": asked}, json.dumps(store.about))
    top_k(Dot(), store, queries, 10)  # What is loaded once, for a store of any size.
    before, peak, done = _anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    top_k(Trak(), store, queries, 10)
    done.set()
    watcher.join()
    return max(0.0, peak[0] - before)


def _anonymous() -> float:
    """The memory of its own that this process has now, in MB: mapped files are the system's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)["RssAnon"].split()[0]) / 1024


def memory(folder: Path) -> float:
    """`score` in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.attribution", "--score", str(folder)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(argv: list[str] | None = None) -> int:
    """Prints both tables; 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="fewer examples; only memory has a limit")
    parser.add_argument("--score", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.score is not None:
        print(score(options.score))
        return 0
    sizes = SMALL if options.small else SIZES
    device = "cuda" if torch.cuda.is_available() else "cpu"
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder, task = Path(name), denoiser(device)
        made = torch.Generator().manual_seed(0)
        examples = {"latents": torch.randn(sizes["examples"], 3, 16, 16, generator=made).to(device)}
        kinds = ("rademacher", "sparse", "factored")
        side = int((sizes["dim"] / 64) ** 0.5) ** 2
        widths = {k: side if k == "factored" else sizes["dim"] for k in kinds}
        works = {k: lambda k=k: ours(task, examples, widths[k], k, folder / "a") for k in kinds}
        works["traker"] = lambda: traker(task, examples, sizes["dim"], folder / "b")
        seconds = paired(works, options.rounds)
        n = sum(p.numel() for p in task.module.parameters())
        print(f"{sizes['examples']} examples x {N_STEPS} timesteps, {n} parameters, {device}, 1 thread")
        for kind in kinds:
            times = ratio(seconds, "traker", kind)
            print(f"  {kind:12} {times:6.1f} x traker's examples per second")
            # Of few examples the ratio is mostly what making the projection costs.
            failed |= not options.small and times < LIMITS["examples per second, ours / traker"]
        grown = []
        for count in (sizes["few"], sizes["many"]):
            stored(folder / str(count), count, sizes["features"])
            grown.append(memory(folder / str(count)))
            print(f"  100 queries against {count:7} examples: {grown[-1]:7.1f} MB")
        failed |= grown[1] - grown[0] > LIMITS["growth in MB"]
    print("limits:", LIMITS, "missed" if failed else "met")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
