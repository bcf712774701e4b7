"""What a decomposition costs at ViT-B/16 shapes, and what naming heads keeps of 100,000 images.

python -m tests.benchmarks.decomposition [--small]
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import mm_adapters as mm
from methods_multimodal.text_explanations.decomposition import decompose
from methods_multimodal.text_explanations.moments import Moments
from methods_multimodal.text_explanations.second_order import second_order
from methods_multimodal.text_explanations.text_span import text_span
from tests.benchmarks._memory import peak
from tests.benchmarks._paired import paired, ratio

LIMITS = {"time, all rows / ours": (8.0, None), "memory, ours / all rows": (None, 1 / 3),
          "memory, many images / a tenth": (None, 1.05),
          "memory, second order / [tokens, neurons, d]": (None, 1 / 3)}  # fmt: skip


def vit(layers: int, small: bool) -> CLIPVisionModelWithProjection:
    """A random ViT-B/16 (224 pixels, 197 tokens) with so many of its layers; small: a quarter as wide."""
    torch.manual_seed(0)
    width = 192 if small else 768
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        patch_size=16,
        image_size=112 if small else 224,
        projection_dim=width * 2 // 3,
    )
    return CLIPVisionModelWithProjection(config).eval()


@torch.no_grad()
def all_rows(model: Any, pixels: Tensor) -> Tensor:
    """The formulation as it is written: every head's output for each query and each key, in full width.

    Then the class token's row is taken, normalised and projected: [b, layer, key, head, joint].
    """
    vision, kept = model.vision_model, {}
    blocks = vision.encoder.layers
    handles = [
        block.self_attn.register_forward_pre_hook(
            lambda m, a, k, i=i: kept.update({i: k.get("hidden_states", a[0] if a else None)}),
            with_kwargs=True,
        )
        for i, block in enumerate(blocks)
    ]
    handles.append(vision.post_layernorm.register_forward_pre_hook(lambda m, a: kept.update(end=a[0])))
    model(pixels)
    for handle in handles:
        handle.remove()
    end, norm = kept["end"], vision.post_layernorm
    deviation = (end.var(-1, unbiased=False) + norm.eps).sqrt().reshape(-1, 1, 1, 1)
    found = []
    for i, block in enumerate(blocks):
        a = block.self_attn
        q, k, v = (
            rearrange(p(kept[i]), "b n (h d) -> b h n d", h=a.num_heads)
            for p in (a.q_proj, a.k_proj, a.v_proj)
        )
        pattern = (q @ k.mT * a.head_dim**-0.5).softmax(-1)
        weighted = pattern.unsqueeze(-1) * v.unsqueeze(2)  # [b, h, query, key, d_head]
        out = rearrange(a.out_proj.weight, "m (h d) -> h d m", h=a.num_heads)
        wide = torch.einsum("bhqkd,hdm->bqkhm", weighted, out)
        row = wide[:, 0]
        row = (row - row.mean(-1, keepdim=True)) / deviation * norm.weight
        found.append(row @ model.visual_projection.weight.T)
    return torch.stack(found, 1)


def heads(small: bool, rounds: int) -> dict[str, float]:
    """A decomposition beside the formulation as it is written: its time, and memory on top of the model."""
    module = vit(2 if small else 3, small)
    pixels = torch.randn(1, 3, *(2 * [module.config.image_size]))
    model = mm.HookedModel(module)
    works = {"all rows": lambda: all_rows(module, pixels), "ours": lambda: decompose(model, images=pixels)}
    seconds = paired(works, rounds)
    return {
        "time, all rows / ours": ratio(seconds, "all rows", "ours"),
        "memory, ours / all rows": peak(works["ours"]) / peak(works["all rows"]),
    }


def stream(n_images: int, small: bool) -> None:
    """Names all heads of a B/16 from a simulated stream of what they wrote."""
    layers, heads, d_head, width = (2, 4, 64, 128) if small else (12, 12, 64, 512)
    g = torch.Generator().manual_seed(0)
    basis = torch.randn(layers, heads, d_head, width, generator=g)
    moments = Moments.none(layers, heads, d_head, basis=basis)
    for _ in range(n_images // 500):
        moments = moments.plus(torch.randn(500, layers, heads, d_head, generator=g))
    texts = torch.nn.functional.normalize(torch.randn(3498, width, generator=g), dim=1)
    for layer in range(layers):
        for head in range(heads):
            text_span(moments[layer, head], texts, 80, 20)


def neurons(small: bool) -> float:
    """The share of [tokens, neurons, d] that second-order effects of every neuron of a layer take."""
    module = vit(3, small)
    pixels = torch.randn(2, 3, *(2 * [module.config.image_size]))
    model = mm.HookedModel(module)
    found = second_order(model, images=pixels, layer=0)
    tokens, width = (module.config.image_size // 16) ** 2 + 1, module.config.hidden_size
    full = 2 * tokens * found.amounts.shape[2] * width * 4
    return peak(lambda: second_order(model, images=pixels, layer=0)) / full


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--small", action="store_true", help="Narrow shapes, in seconds; only memory has a limit"
    )
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = heads(options.small, rounds=3)
    few, many = (1000, 10_000) if options.small else (10_000, 100_000)
    sizes = [peak(lambda n=n: stream(n, options.small)) for n in (few, many)]
    rows["memory, many images / a tenth"] = sizes[1] / sizes[0]
    rows["memory, second order / [tokens, neurons, d]"] = neurons(options.small)
    print(f"named {many} images: {sizes[1] / 2**20:.1f} MiB; {few}: {sizes[0] / 2**20:.1f} MiB")
    missed = 0
    for name, value in rows.items():
        low, high = LIMITS.get(name, (None, None))
        low = None if options.small else low
        good = (low is None or value >= low) and (high is None or value <= high)
        missed += not good
        bound = f">= {low:g}" if low else f"<= {high:.3g}" if high else ""
        print(f"{name:<46} {value:10.3f}  {bound} {'' if not bound else 'ok' if good else 'MISSED'}")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
