"""CLIP-Dissect over a store beside its formula with the whole matrix in memory and a loop over units.

python -m tests.benchmarks.dissection [--rounds 3] [--small]

Features are simulated: 3,072 units, 20,000 images, 10,000 concepts, 512 dimensions. Ours reads the
store on disk, and its whole process must stay below 1.5 GB; the formula gets its activations and
embeddings in memory.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from methods_multimodal.dissection.naming import JUDGE, clip_dissect
from mm_adapters.store import Column, Store, Writer
from tests.benchmarks._paired import paired, ratio

SIZES = {"units": 3072, "images": 20_000, "concepts": 10_000, "width": 512}
SMALL = {"units": 256, "images": 4000, "concepts": 2000, "width": 128}
LIMITS = {"formula / ours": 5.0, "memory in GB": 1.5}


def make(folder: Path, sizes: dict[str, int]) -> None:
    """A store of random activations and embeddings."""
    made = torch.Generator().manual_seed(0)
    columns = {"site": Column((sizes["units"],)), JUDGE: Column((sizes["width"],))}
    with Writer(folder, columns, {"simulated": True}) as writer:
        for first in range(0, sizes["images"], 1000):
            n = min(1000, sizes["images"] - first)
            seen = torch.nn.functional.normalize(torch.randn(n, sizes["width"], generator=made), dim=1)
            writer.append({"site": torch.randn(n, sizes["units"], generator=made), JUDGE: seen}, items=n)


def texts_of(sizes: dict[str, int]) -> Tensor:
    """Random unit vectors."""
    made = torch.Generator().manual_seed(1)
    return torch.nn.functional.normalize(
        torch.randn(sizes["concepts"], sizes["width"], generator=made), dim=1
    )


def formula(activations: Tensor, seen: Tensor, texts: Tensor) -> Tensor:
    """soft_wpmi as it is written: the whole matrix, then one unit at a time."""
    likely = torch.softmax(10 * (seen @ texts.T), 1)
    top = activations.topk(100, 0).indices
    p = (0.998 - torch.arange(100) / 100 * (0.998 - 0.97))[:, None]
    scores = torch.stack([torch.log(1 + p * (likely[unit] - 1) + 1e-7).sum(0) for unit in top.T])
    return scores - (scores.logsumexp(0) - torch.tensor(float(len(scores))).log())


def ours(folder: Path, sizes: dict[str, int]) -> Tensor:
    """The same from the store."""
    names = [str(i) for i in range(sizes["concepts"])]
    return clip_dissect(Store(folder), "site", texts_of(sizes), names, progress=False).scores


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="seconds, not minutes; no limit on the time")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = SMALL if args.small else SIZES
    if args.memory_of:
        ours(args.memory_of, sizes)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "store"
        make(folder, sizes)
        command = [sys.executable, "-m", "tests.benchmarks.dissection", "--memory-of", str(folder)]
        told = subprocess.run(
            command + ["--small"] * args.small, capture_output=True, text=True, check=True
        ).stdout
        rows = Store(folder).rows()
        activations, seen = rows["site"].clone(), rows[JUDGE].clone()
        texts = texts_of(sizes)
        torch.testing.assert_close(
            ours(folder, sizes), formula(activations, seen, texts), rtol=1e-4, atol=1e-3
        )
        works = {"formula": lambda: formula(activations, seen, texts), "ours": lambda: ours(folder, sizes)}
        seconds = paired(works, args.rounds)
    found = {"formula / ours": ratio(seconds, "formula", "ours"), "memory in GB": float(told.split()[-1])}
    print(f"{sizes['units']} units, {sizes['images']} images, {sizes['concepts']} concepts")
    missed = False
    for name, value in found.items():
        over = value < LIMITS[name] if name == "formula / ours" else value > LIMITS[name]
        over = over and not (args.small and name == "formula / ours")
        missed |= over
        bound = ">=" if name == "formula / ours" else "<="
        print(f"  {name:<16} {value:6.2f}   required {bound} {LIMITS[name]}{'   MISSED' if over else ''}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
