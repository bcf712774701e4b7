"""What hooks cost: a HookedModel beside the raw model and TransformerLens' bridge.

python -m tests.benchmarks.overhead [--rounds 15] [--small]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import mm_adapters as mm
from tests.benchmarks._bridge import bridge_of
from tests.benchmarks._paired import extra, paired, ratio

# glibc gives freed pages back and faults them in again, at the cost of whoever allocates next, so
# one contestant pays for another. With these the heap keeps its pages, the same for all.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "33554432"}

LIMITS = {
    "forward, no hooks / raw": 1.02,
    "cache everything / raw": 1.15,
    "cache everything / bridge": 1.0,
    "fixed cost, no hooks / bridge": 0.5,
    "fixed cost, one hook / bridge": 0.5,
    "fixed cost, cache everything / bridge": 1.0,
}


def vit_b32() -> CLIPVisionModel:
    """A random CLIP ViT-B/32 tower."""
    torch.manual_seed(0)
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            image_size=224,
            patch_size=32,
        )
    ).eval()


def narrow() -> CLIPVisionModel:
    """Twelve layers so narrow that Python is all they cost."""
    torch.manual_seed(0)
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=12,
            num_attention_heads=4,
            image_size=32,
            patch_size=16,
        )
    ).eval()


@torch.no_grad()
def compute_bound(module: nn.Module, pixels: torch.Tensor, rounds: int) -> dict[str, float]:
    """Ratios where the arithmetic dominates."""
    hooked, bridge = mm.HookedModel(module), bridge_of(module)
    seconds = paired(
        {
            "raw": lambda: module(pixels),
            "hooked": lambda: hooked(pixels),
            "hooked cache": lambda: hooked.run_with_cache(pixels),
            "bridge": lambda: bridge(pixels),
            "bridge cache": lambda: bridge.run_with_cache(pixels),
        },
        rounds,
    )
    return {
        "forward, no hooks / raw": ratio(seconds, "hooked", "raw"),
        "cache everything / raw": ratio(seconds, "hooked cache", "raw"),
        "bridge, cache everything / raw": ratio(seconds, "bridge cache", "raw"),
        "cache everything / bridge": ratio(seconds, "hooked cache", "bridge cache"),
    }


@torch.no_grad()
def python_bound(rounds: int) -> dict[str, float]:
    """What the lens and the bridge add to a forward that has hardly any arithmetic."""
    module = narrow()
    pixels = torch.randn(1, 3, 32, 32)
    hooked, bridge = mm.HookedModel(module), bridge_of(module)
    nothing = lambda value, hook: None  # noqa: E731
    seconds = paired(
        {
            "raw": lambda: module(pixels),
            "hooked": lambda: hooked(pixels),
            "bridge": lambda: bridge(pixels),
            "hooked hook": lambda: hooked.run_with_hooks(
                pixels, fwd_hooks=[("vision.blocks.5.hook_resid_post", nothing)]
            ),
            "bridge hook": lambda: bridge.run_with_hooks(
                pixels, fwd_hooks=[("blocks.5.hook_resid_post", nothing)]
            ),
            "hooked cache": lambda: hooked.run_with_cache(pixels),
            "bridge cache": lambda: bridge.run_with_cache(pixels),
        },
        rounds,
        repeat=5,
    )

    def fixed(what: str) -> float:
        return max(extra(seconds, f"hooked{what}", "raw"), 0.0) / extra(seconds, f"bridge{what}", "raw")

    return {
        "fixed cost, no hooks / bridge": fixed(""),
        "fixed cost, one hook / bridge": fixed(" hook"),
        "fixed cost, cache everything / bridge": fixed(" cache"),
    }


_PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from tests.benchmarks.overhead import vit_b32
import mm_adapters as mm
module = vit_b32()
if sys.argv[1] == "hooked":
    module = mm.HookedModel(module)
pixels = torch.randn(8, 3, 224, 224)
with torch.no_grad():
    for _ in range(3):
        module(pixels)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory() -> dict[str, float]:
    """Peak memory of unhooked forwards, in processes of their own: hooked over raw."""
    kilobytes = {
        which: int(
            subprocess.run(
                [sys.executable, "-W", "ignore", "-c", _PEAK, which],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for which in ("raw", "hooked")
    }
    return {"peak memory, no hooks / raw": kilobytes["hooked"] / kilobytes["raw"]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--small", action="store_true", help="Python cost only, in seconds rather than minutes"
    )
    options = parser.parse_args(argv)
    if not ALLOCATOR.items() <= os.environ.items():
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.overhead",
            *(sys.argv[1:] if argv is None else argv),
        ]
        return subprocess.run(command, env=os.environ | ALLOCATOR, check=False).returncode
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = python_bound(options.rounds)
    if not options.small:
        rows |= compute_bound(vit_b32(), torch.randn(8, 3, 224, 224), options.rounds) | peak_memory()
    missed = 0
    for name, value in rows.items():
        limit = LIMITS.get(name)
        verdict = "" if limit is None else f"<= {limit:<5}" + ("ok" if value <= limit else "MISSED")
        missed += verdict.endswith("MISSED")
        print(f"{name:<40} {value:6.3f}  {verdict}")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
