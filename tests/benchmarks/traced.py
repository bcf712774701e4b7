"""What our nnsight engine costs beside nnsight's own: a trace that saves every layer, and a remote call.

python -m tests.benchmarks.traced [--rounds 15] [--small] [--host http://127.0.0.1:PORT]

With `--host` (a service that `mm-interp ndif up` started, or tests/ndif/standin.py) warm remote calls are
timed too: by the clock, for most of one is waiting.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import nnsight
import torch
from nnsight.modeling.transformers import TransformersModel
from torch import nn

import mm_adapters as mm
from mm_adapters import zoo
from mm_adapters.traced import TracedModel
from tests.benchmarks._paired import extra, paired, ratio
from tests.benchmarks.overhead import ALLOCATOR, narrow, vit_b32

# What a trace costs is the same however many images it is given: of one it is the largest share.
BATCHES = (1, 8)
LIMITS = {f"ViT-B/32, batch {batch}, every layer saved / raw": 1.02 for batch in BATCHES} | {
    "what a trace adds / ViT-B/32, batch 1": 0.02,
    "tiny, every layer saved / nnsight": 1.3,
    "warm remote call / nnsight": 1.2,
}


def layers_of(ours: TracedModel, model: Any) -> list[Any]:
    """The envoys of a tower's blocks, in either model."""
    (tower,) = ours.sitemap.towers.values()
    return [model.get(path) for path in tower.stacks["blocks"]]


def saving(model: Any, envoys: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    """A trace that saves every layer's output."""
    kept: list[torch.Tensor] = []
    with torch.no_grad(), model.trace(pixel_values=pixels):
        kept = nnsight.save([])
        for layer in envoys:
            kept.append(layer.output)
    return kept


def pair(module: nn.Module) -> tuple[TracedModel, Any]:
    """Our model and nnsight's own, of modules with the same weights."""
    import copy

    theirs = nnsight.NNsight(copy.deepcopy(module))  # Of an untouched module: a copy would keep our forwards.
    return TracedModel(module), theirs


@torch.no_grad()
def compute_bound(rounds: int, batch: int) -> dict[str, float]:
    """Where the arithmetic dominates: a ViT-B/32, beside plain hooks that keep the same outputs."""
    raw, hooked = vit_b32(), vit_b32()
    ours, theirs = pair(vit_b32())
    our_layers, their_layers = layers_of(ours, ours), layers_of(ours, theirs)
    pixels = torch.randn(batch, 3, 224, 224)
    kept: list[torch.Tensor] = []
    (tower,) = ours.sitemap.towers.values()
    for path in tower.stacks["blocks"]:
        hooked.get_submodule(path).register_forward_hook(lambda _m, _i, output: kept.append(output))

    def keeping() -> list[torch.Tensor]:
        kept.clear()
        hooked(pixels)
        return list(kept)

    seconds = paired(
        {
            "raw": lambda: raw(pixels),
            "hooks": keeping,
            "ours": lambda: saving(ours, our_layers, pixels),
            "theirs": lambda: saving(theirs, their_layers, pixels),
        },
        rounds,
    )
    name = f"ViT-B/32, batch {batch}"
    return {
        f"{name}, every layer saved / raw": ratio(seconds, "ours", "raw"),
        f"{name}, nnsight / raw": ratio(seconds, "theirs", "raw"),
        f"{name}, plain hooks / raw": ratio(seconds, "hooks", "raw"),
    }


@torch.no_grad()
def added(rounds: int) -> dict[str, float]:
    """What saving every layer adds where Python dominates, as a share of a ViT-B/32 with as many modules.

    The same as the ratio above, with less noise: that one is a small part of a long time.
    """
    module, narrow_raw, wide_raw = narrow(), narrow(), vit_b32()
    ours, theirs = pair(module)
    our_layers, their_layers = layers_of(ours, ours), layers_of(ours, theirs)
    small, large = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 224, 224)
    seconds = paired(
        {
            "raw": lambda: narrow_raw(small),
            "ours": lambda: saving(ours, our_layers, small),
            "theirs": lambda: saving(theirs, their_layers, small),
            "wide": lambda: wide_raw(large),
        },
        rounds,
    )
    whole = statistics.median(seconds["wide"])
    return {
        "what a trace adds / ViT-B/32, batch 1": extra(seconds, "ours", "raw") / whole,
        "what nnsight's adds / ViT-B/32, batch 1": extra(seconds, "theirs", "raw") / whole,
    }


@torch.no_grad()
def python_bound(rounds: int) -> dict[str, float]:
    """Where Python dominates: twelve narrow layers."""
    ours, theirs = pair(narrow())
    our_layers, their_layers = layers_of(ours, ours), layers_of(ours, theirs)
    pixels = torch.randn(1, 3, 32, 32)
    seconds = paired(
        {
            "ours": lambda: saving(ours, our_layers, pixels),
            "theirs": lambda: saving(theirs, their_layers, pixels),
        },
        rounds,
        repeat=5,
    )
    return {"tiny, every layer saved / nnsight": ratio(seconds, "ours", "theirs")}


def remote(host: str, rounds: int) -> dict[str, float]:
    """Warm calls over the wire: the same block on our model and on nnsight's own, by turns."""
    nnsight.CONFIG.APP.REMOTE_LOGGING = False
    path = str(zoo.path("tiny-clip"))
    nnsight.modeling.huggingface._ID_CACHE[path] = path
    ours = mm.load("tiny-clip", engine="nnsight")
    theirs = TransformersModel(path, task="zero-shot-image-classification", dispatch=True)
    inputs = ours.arguments((), {"text": ["a red circle"], "images": [zoo.sample_images()["red_circle"]]})

    def call(model: Any) -> float:
        start = time.perf_counter()
        with model.trace(**inputs, remote=host):
            model.vision_model.encoder.layers[1].output.save()
        return time.perf_counter() - start

    for model in (ours, theirs):
        for _ in range(3):
            call(model)
    turns = [(call(ours), call(theirs)) for _ in range(rounds)]
    return {
        "warm remote call / nnsight": statistics.median(a / b for a, b in turns),
        "warm remote call, ms": 1000 * statistics.median(a for a, _ in turns),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="Python cost only")
    parser.add_argument("--host", help="a service, to time remote calls too")
    given = parser.parse_args(argv)
    if not ALLOCATOR.items() <= os.environ.items():
        command = [sys.executable, "-m", "tests.benchmarks.traced", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=os.environ | ALLOCATOR, check=False).returncode
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = python_bound(given.rounds)
    if not given.small:
        for batch in BATCHES:
            rows |= compute_bound(given.rounds, batch)
        rows |= added(given.rounds)
    if given.host:
        rows |= remote(given.host, given.rounds)
    missed = 0
    for name, value in rows.items():
        limit = LIMITS.get(name)
        verdict = "" if limit is None else f"<= {limit:<5}" + ("ok" if value <= limit else "MISSED")
        missed += verdict.endswith("MISSED")
        print(f"{name:<45} {value:8.3f}  {verdict}")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
