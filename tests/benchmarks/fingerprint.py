"""What saying of stored work what it is of costs, as a share of the work.

python -m tests.benchmarks.fingerprint [--rounds 7] [--small]

The work is `collect` of one site: of 1,000 pictures of the zoo's world with tiny-clip; of 200 of 256 x 256
with a CLIP of ViT-B/32's size with random weights. The fingerprint is of all weights, and of every byte of
the pictures' files. Noise is the worst case: its files are the largest of this size. Rounds
are paired, by the processor's clock.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import mm_adapters as mm
from integrations.sae_lens import collect
from mm_adapters.storage import fingerprint
from mm_adapters.store import provenance
from mm_adapters.zoo import world
from mm_adapters.zoo.tokenizer import clip_tokenizer
from tests.benchmarks._paired import paired, ratio

SITE = "vision.blocks.1.hook_resid_post"
LIMIT = 0.01


def scenes(folder: Path, n: int, side_px: int) -> list[Path]:
    """Pictures of the zoo's world."""
    return _saved(folder, (world.render(world.scene(i, "validation", 0)) for i in range(n)), side_px)


def noise(folder: Path, n: int, side_px: int) -> list[Path]:
    """Files that compress least."""
    rng = np.random.default_rng(0)
    return _saved(folder, (rng.integers(0, 255, (side_px, side_px, 3), np.uint8) for _ in range(n)), side_px)


def _saved(folder: Path, pixels: Iterable[NDArray[np.uint8]], side_px: int) -> list[Path]:
    folder.mkdir()
    files: list[Path] = []
    for i, picture in enumerate(pixels):
        files.append(folder / f"{i:05d}.png")
        Image.fromarray(picture).resize((side_px, side_px)).save(files[-1])
    return files


def of_published_size() -> mm.Model:
    """A CLIP of the shape of openai/clip-vit-base-patch32, 605 MB of random weights."""
    model = CLIPModel(CLIPConfig()).eval()  # Its defaults are that checkpoint's.
    processor = CLIPProcessor(CLIPImageProcessor(), clip_tokenizer())
    return mm.wrap(model, processor=processor)


def share(model: mm.Model, files: list[Path], rounds: int, folder: Path) -> tuple[float, float]:
    """The fingerprint's seconds over those of the whole work, and the seconds of the fingerprint."""
    folders = (folder / str(i) for i in itertools.count())

    def work() -> None:
        fingerprint._of_bytes_in.cache_clear()  # As in a new process.
        collect(model, SITE, files, next(folders), batch_size=32, progress=False)

    def said() -> None:
        fingerprint._of_bytes_in.cache_clear()
        provenance(models={"model": model}, data=files, sites=[SITE], batch_size=32)

    seconds = paired({"work": work, "fingerprint": said}, rounds)
    return ratio(seconds, "fingerprint", "work"), min(seconds["fingerprint"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="the first row alone")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    missed = 0
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        small = mm.load("tiny-clip", device="cpu")
        jobs: dict[str, tuple[mm.Model, Any, int, int]] = {
            "tiny-clip, 1,000 pictures": (small, scenes, 1000, 64),
        }
        if not options.small:
            jobs["tiny-clip, 1,000 of noise"] = (small, noise, 1000, 64)
            jobs["ViT-B/32, 200 pictures"] = (of_published_size(), scenes, 200, 256)
        for i, (name, (model, draw, n, side_px)) in enumerate(jobs.items()):
            files = draw(folder / f"pictures {i}", n, side_px)
            (folder / f"stores {i}").mkdir()
            found, seconds = share(model, files, options.rounds, folder / f"stores {i}")
            missed += found >= LIMIT
            verdict = "ok" if found < LIMIT else "MISSED"
            print(
                f"{name:<26} {100 * found:5.2f} %  ({1000 * seconds:.0f} ms)  < {100 * LIMIT:.0f} % {verdict}"
            )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
