"""What our nnsight engine costs beside nnsight's own: a trace that saves every layer, and a remote call.

python -m tests.benchmarks.traced [--rounds 15] [--small] [--host http://127.0.0.1:PORT]

With `--host` (a service that `mm-interp ndif up` started, or tests/ndif/standin.py) warm remote calls are
timed too: by the clock, for most of one is waiting.
"""

from __future__ import annotations

import argparse
import statistics
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
from tests.benchmarks._paired import paired, ratio
from tests.benchmarks.overhead import narrow, vit_b32

LIMITS = {
    "ViT-B/32, every layer saved / raw": 1.02,
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

    return TracedModel(module), nnsight.NNsight(copy.deepcopy(module))


@torch.no_grad()
def compute_bound(rounds: int) -> dict[str, float]:
    """Where the arithmetic dominates: a ViT-B/32."""
    raw = vit_b32()
    ours, theirs = pair(vit_b32())
    our_layers, their_layers = layers_of(ours, ours), layers_of(ours, theirs)
    pixels = torch.randn(1, 3, 224, 224)
    seconds = paired(
        {
            "raw": lambda: raw(pixels),
            "ours": lambda: saving(ours, our_layers, pixels),
            "theirs": lambda: saving(theirs, their_layers, pixels),
        },
        rounds,
    )
    return {
        "ViT-B/32, every layer saved / raw": ratio(seconds, "ours", "raw"),
        "ViT-B/32, nnsight / raw": ratio(seconds, "theirs", "raw"),
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
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = python_bound(given.rounds)
    if not given.small:
        rows |= compute_bound(given.rounds)
    if given.host:
        rows |= remote(given.host, given.rounds)
    missed = 0
    for name, value in rows.items():
        limit = LIMITS.get(name)
        verdict = "" if limit is None else f"<= {limit:<5}" + ("ok" if value <= limit else "MISSED")
        missed += verdict.endswith("MISSED")
        print(f"{name:<40} {value:8.3f}  {verdict}")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
