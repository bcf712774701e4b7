"""What seeing words costs: word maps beside plain generation and beside daam; memory; attribution.

python -m tests.benchmarks.cross_attention [--small] [--memory [--whole]] [--rounds 7]

daam 0.2.0 is asked if it can be imported (see tests/parity/cross_attention.py for how to install it).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import types
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import mm_adapters as mm
from methods_multimodal.cross_attention import Case, attribute_patching, colour, word_maps
from tests.benchmarks._paired import paired, ratio
from tests.parity import cross_attention as peers

ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "33554432"}
PROMPT = "a large red circle in the middle on a white background"
LIMITS = {
    "word maps / plain": 1.15,
    "word maps and pixels' own / plain": 1.15,
    "word maps / daam": 1.0,
    "attribution of all heads x steps by one gradient / generation": 5.5,
    "attribution of all heads x steps, 10 points / generation": 40.0,
}


def time_watching(rounds: int, steps: int) -> dict[str, float]:
    """Word maps of tiny-sd in one run, beside the run alone and beside daam."""
    model = mm.load("tiny-sd")
    model.wrapped.set_progress_bar_config(disable=True)
    inputs = {"prompt": PROMPT, "num_inference_steps": steps, "seed": 0, "output_type": "pt"}
    works: dict[str, Any] = {
        "plain": lambda: model.run(inputs),
        "word maps": lambda: word_maps(model, inputs, keep=()),
        "word maps and pixels' own": lambda: word_maps(model, inputs, keep=(), spread=True),
    }
    seconds = paired(works, rounds)
    return {f"{name} / plain": ratio(seconds, name, "plain") for name in works if name != "plain"}


def time_daam(rounds: int, steps: int) -> dict[str, float]:
    """Word maps beside daam in the same run, if daam is there.

    It takes no prompt but one of 77 tokens, so not tiny-sd's: a random pipeline with latents of 32 x 32.
    """
    pipeline = peers.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae_scale_factor = 8
    inputs = {
        "prompt": "a big cat",
        "num_inference_steps": steps,
        "seed": 0,
        "height": 256,
        "width": 256,
        "output_type": "latent",
    }
    peer = daam_of(pipeline, inputs)
    if peer is None:
        return {}
    model = mm.HookedModel(pipeline)
    works: dict[str, Any] = {
        "plain": lambda: model.run(inputs),
        "word maps": lambda: word_maps(model, inputs, keep=())[0].at(),
        "daam": peer,
    }
    seconds = paired(works, rounds)
    return {
        "word maps / daam": ratio(seconds, "word maps", "daam"),
        "daam / plain": ratio(seconds, "daam", "plain"),
        "word maps / plain, same pipeline": ratio(seconds, "word maps", "plain"),
    }


def daam_of(pipeline: Any, inputs: dict[str, Any]) -> Any:
    """The same generation under daam's hooks, or None if daam is not there."""
    for name in ("spacy", "spacy.tokens"):
        if name not in sys.modules:  # For its command line alone.
            stand_in: Any = types.ModuleType(name)
            stand_in.tokens = types.SimpleNamespace(Token=object)
            stand_in.Token = object
            sys.modules[name] = stand_in
    try:
        from daam import trace  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    given = {k: v for k, v in inputs.items() if k != "seed"}

    def work() -> None:
        with torch.no_grad(), trace(pipeline) as tracer:
            pipeline(**given, generator=torch.Generator().manual_seed(0))
            tracer.compute_global_heat_map()

    return work


def time_attribution(rounds: int, steps: int) -> dict[str, float]:
    """Every head of every layer at every step by one gradient and by ten, beside one generation."""
    model = mm.load("tiny-sd")
    model.wrapped.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps}
    inputs = {**options, "prompt": PROMPT, "seed": 0, "output_type": "pt"}
    case = Case(PROMPT, "red", PROMPT.replace("red", "blue"), "blue")
    metric = colour((0.18, 0.31, 0.84))
    works = {
        "generation": lambda: model.run(inputs),
        "gradient": lambda: attribute_patching(model, [case], metric, options=options, method="gradient"),
        "10 points": lambda: attribute_patching(model, [case], metric, options=options, points=10),
    }
    seconds = paired(works, rounds)
    what = "attribution of all heads x steps"
    return {
        f"{what} by one gradient / generation": ratio(seconds, "gradient", "generation"),
        f"{what}, 10 points / generation": ratio(seconds, "10 points", "generation"),
    }


# ---- memory ------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of living tensors' storages, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, out)
        return out

    def _count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def stable_diffusion_15(whole: bool, text_width: int = 768) -> Any:
    """Stable Diffusion 1.5's denoiser with random weights: whole, or its finest resolution alone, whose
    maps are the largest; and a small text encoder of its width."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
    import tiny

    finest: dict[str, Any] = {
        "block_out_channels": (320,), "layers_per_block": 1, "mid_block_type": None,
        "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",),
    }  # fmt: skip
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=text_width,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=12,
            vocab_size=60,
            max_position_embeddings=77,
            bos_token_id=52,
            eos_token_id=53,
            pad_token_id=53,
        )
    )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=text,
        tokenizer=tiny.letter_tokenizer(77),
        unet=UNet2DConditionModel(
            sample_size=64, cross_attention_dim=text_width, attention_head_dim=8, **({} if whole else finest)
        ),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure_memory(whole: bool, steps: int = 5, size_px: int = 512) -> dict[str, float]:
    """The most that lives at once during a run with word maps, less that of the run alone, in MB.

    One layer's map is [head, pixel] at the finest resolution; the prompt has ten words.
    """
    model = mm.HookedModel(stable_diffusion_15(whole))
    words = ["aa", "bb", "cc", "dd", "ee", "ff", "gg", "hh", "ii", "jj"]
    inputs = {
        "prompt": " ".join(words),
        "num_inference_steps": steps,
        "seed": 0,
        "height": size_px,
        "width": size_px,
        "output_type": "latent",
    }
    most = {}
    for name in ("plain", "word maps", "word maps and pixels' own")[: 3 if whole else 2]:
        with Live() as live:
            if name == "plain":
                model.run(inputs)
            else:
                word_maps(model, inputs, keep=(), spread=name != "word maps")
        most[name] = live.most / 1e6
    n_pixels = (size_px // 8) ** 2
    return {
        "plain, MB": most["plain"],
        **{f"{name}, MB more": value - most["plain"] for name, value in most.items() if name != "plain"},
        "one layer's map x words, MB": 8 * n_pixels * len(words) * 4 / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="few steps, and no shapes of Stable Diffusion")
    parser.add_argument(
        "--memory", action="store_true", help="Stable Diffusion 1.5's shapes, 512 pixels, 5 steps"
    )
    parser.add_argument(
        "--whole", action="store_true", help="with --memory: every layer, not the largest alone"
    )
    parser.add_argument("--room", type=float, default=1.0, help="how far over its limit a ratio may be")
    args = parser.parse_args()
    if any(os.environ.get(k) != v for k, v in ALLOCATOR.items()):
        again = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.cross_attention", *sys.argv[1:]]
        return subprocess.run(again, env=os.environ | ALLOCATOR, check=False).returncode
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    if args.memory:
        memory = measure_memory(args.whole)
        for name, value in memory.items():
            print(f"{name:<55} {value:9.2f}")
        limit = memory["one layer's map x words, MB"]
        failed = [n for n in memory if n == "word maps, MB more" and memory[n] > limit]
    else:
        found |= time_watching(args.rounds, 6 if args.small else 20)
        found |= time_daam(args.rounds, 6 if args.small else 20)
        found |= time_attribution(max(3, args.rounds // 2), 4 if args.small else 20)
        for name, value in found.items():
            print(f"{name:<55} {value:6.3f}  {f'<= {LIMITS[name]}' if name in LIMITS else ''}")
        if args.small:  # One step of six is a larger share of them than one of twenty.
            del LIMITS["word maps and pixels' own / plain"]
        failed = [name for name, value in found.items() if value > args.room * LIMITS.get(name, float("inf"))]
    if failed:
        print("over the limit:", ", ".join(failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
