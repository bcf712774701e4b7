"""How many units of each layer detect what, whether held-out pictures agree, and whether it matters.

python -m tests.quality.dissection [--only tiny-clip,tiny-llava,tiny-sd,random,causal] [--n 320]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.core.statistics import auroc
from methods_multimodal.dissection import Concepts, Units
from methods_multimodal.dissection.concepts import Masks, presence
from methods_multimodal.dissection.survey import survey
from mm_adapters.zoo import judges, labels, measures, world
from tests.quality.cross_attention import region

CONCEPTS = Concepts(labels.NAMES, labels.MEMBER_OF)
SHOWN = ("shape", "colour", "background", "position")
SITES = {
    "tiny-clip": [f"vision.blocks.{i}.mlp.hook_post" for i in range(4)],
    "tiny-llava": [f"language.blocks.{i}.mlp.hook_post" for i in range(4)],
    "tiny-sd": [f"denoiser.resnets.{i}.hook_out" for i in (1, 3, 4, 5, 7)],
}
# Units of the causal check, of the 512 that the heads of tiny-clip have.
ABLATED = 64

Batch = tuple[Mapping[str, Any], Sequence[Any]]


def seen_batches(name: str, n: int, size: int = 32) -> tuple[list[Batch], list[Masks]]:
    """Pictures of the world as the model's inputs, and what they show."""
    scenes = [world.scene(i, "validation", kind="one") for i in range(n)]
    pictures = measures.images_of(scenes)
    text = ["what is this?"] if name == "tiny-llava" else ["a"]
    parts = [pictures[i : i + size] for i in range(0, n, size)]
    batches: list[Batch] = [
        ({"images": p, "text": text * (len(p) if name == "tiny-llava" else 1)}, p) for p in parts
    ]
    return batches, [labels.masks_of(scene) for scene in scenes]


def drawn_batches(
    model: mm.HookedModel, n: int, steps: int, size: int = 16
) -> tuple[list[Batch], list[Masks]]:
    """Pictures that tiny-sd draws, and what rules on their pixels see in them."""
    cases = measures.prompts_to_draw(n)
    batches: list[Batch] = []
    masks: list[Masks] = []
    for first in range(0, n, size):
        rows = range(first, min(first + size, n))
        inputs = {
            "prompt": [cases[i][1] for i in rows],
            "seed": list(rows),
            "num_inference_steps": steps,
            "guidance_scale": 3.0,
        }
        images = model.run({**inputs, "output_type": "pt"}, read=[]).output.images.float()
        pixels = [(image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy() for image in images]
        for image, shown in zip(images, pixels, strict=True):
            found, where = judges.judge(shown), region(image).numpy()
            names = (found.shape, found.colour, found.position, found.size)
            masks.append({name: where for name in names if name} | {found.background: ~where})
        batches.append((inputs, [Image.fromarray(p) for p in pixels]))
    return batches, masks


def table(name: str, n: int, model: mm.HookedModel | None = None, steps: int = 8) -> list[dict[str, Any]]:
    """Per layer: units whose name is better than chance, by category, and their held-out AUROC."""
    model = model or mm.load(name)
    judge = mm.load("tiny-clip")
    if name == "tiny-sd":
        model.wrapped.set_progress_bar_config(disable=True)
        batches, masks = drawn_batches(model, n // 2, steps)
    else:
        batches, masks = seen_batches(name, n)
    rows = []
    for site in SITES[name]:
        with tempfile.TemporaryDirectory() as folder:
            found = survey(
                Units(model, site),
                batches,
                judge,
                CONCEPTS,
                folder,
                masks=masks,
                kernels=("wpmi",),
                texts=[labels.caption_of(c) for c in CONCEPTS.names],
                n_shuffles=49,
                progress=False,
            )
        for one in found.methods:
            assert one.faithful is not None
            kept = one.chance.significant()
            of = [CONCEPTS.categories[CONCEPTS.index(one.names[u])] for u in kept]
            rows.append(
                {
                    "site": site,
                    "method": one.method,
                    "units": len(one.names),
                    "detectors": len(kept),
                    **{category: of.count(category) for category in SHOWN},
                    "AUROC": _mean(one.faithful.auroc[kept]),
                    "one name for all": _mean(one.faithful.constant[kept]),
                }
            )
    return rows


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")


def at_random(n: int) -> dict[str, float]:
    """tiny-clip with its weights drawn anew: the share of units that survive, beside the level asked.

    The pictures reach the units shuffled, each unit's in an order of its own: what random weights do to
    colours is no chance, as a random sum of red is still redder than one of green.
    """
    from methods_multimodal.dissection.scores import chance
    from methods_multimodal.dissection.similarity import cosine

    torch.manual_seed(0)
    model, judge = mm.load("tiny-clip"), mm.load("tiny-clip")
    for module in model.wrapped.vision_model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    batches, _ = seen_batches("tiny-clip", n)
    units = Units(model, "vision.blocks.3.mlp.hook_post")
    own = torch.cat([units.pooled(inputs) for inputs, _ in batches])
    with torch.no_grad():
        seen = torch.cat([judge.embed(images=list(p)) for _, p in batches])
        said = judge.embed(text=[labels.caption_of(c) for c in CONCEPTS.names])
    similarity = torch.nn.functional.normalize(seen, dim=1) @ torch.nn.functional.normalize(said, dim=1).T
    kept = chance(lambda order: cosine(similarity[order], own), n, n_shuffles=99)
    mixed = torch.stack([column[torch.randperm(n)] for column in own.T], 1)
    null = chance(lambda order: cosine(similarity[order], mixed), n, n_shuffles=99)
    return {
        "share with p <= 0.05, shuffled": float((null.p <= 0.05).float().mean()),
        "detectors, shuffled": len(null.significant()) / mixed.shape[1],
        "detectors, as the random weights are": len(kept.significant()) / own.shape[1],
    }


def causal(n: int, n_sets: int = 8) -> dict[str, dict[str, float]]:
    """Zero-shot accuracy of tiny-clip without the units that tell colours, or shapes, or random ones.

    Units are the heads' outputs (`hook_z`), chosen by how well they tell on the class token which of the
    category's values a picture shows, less how well they tell the other category's; on other pictures
    than accuracy is measured on. They are held at their means.
    """
    model = mm.load("tiny-clip")
    sites = [f"vision.blocks.{i}.attn.hook_z" for i in range(4)]
    batches, masks = seen_batches("tiny-clip", n)
    shown = presence(masks, CONCEPTS)
    told, means = [], {}
    for site in sites:
        read = mm.Read(site, reduce=lambda v: v.detach().flatten(2))
        values = torch.cat([model.run(inputs, read=[read])[site] for inputs, _ in batches])
        told.append((auroc(values[:, 0], shown).nan_to_num(0.5) - 0.5).abs())
        means[site] = values.mean((0, 1))
    width = len(means[sites[0]])
    by_category = {
        category: torch.cat(told)[:, [m == category for m in CONCEPTS.categories]].topk(3, 1).values.mean(1)
        for category in ("colour", "shape")
    }
    scenes = [world.scene(i, "test", kind="one") for i in range(n)]
    pictures = measures.images_of(scenes)
    prepared = [model.prepare(text=["a"], images=pictures[i : i + 50]) for i in range(0, n, 50)]

    def accuracy(units: Tensor) -> dict[str, float]:
        edits = []
        for layer, site in enumerate(sites):
            here = units[(units >= layer * width) & (units < (layer + 1) * width)] - layer * width

            def held(value: Tensor, here: Tensor = here, site: str = site) -> Tensor:
                flat = value.flatten(2).clone()
                flat[..., here] = means[site][here]
                return flat.view_as(value)

            edits.append(mm.Edit(site, held))
        with torch.no_grad():
            out = torch.cat(
                [model.run(inputs, edit=edits, read=[]).output.image_embeds for inputs in prepared]
            )
        right = {}
        for category in ("colour", "shape"):
            texts = model.embed(text=measures.prompts(category)).detach()
            named = (out @ torch.nn.functional.normalize(texts, dim=1).T).argmax(1).tolist()
            truth = [measures.values(category).index(measures.value_of(s, category)) for s in scenes]
            right[category] = float(np.mean([a == b for a, b in zip(named, truth, strict=True)]))
        return right

    made = torch.Generator().manual_seed(0)
    total = width * len(sites)
    random = [accuracy(torch.randperm(total, generator=made)[:ABLATED]) for _ in range(n_sets)]
    colour, shape = by_category["colour"], by_category["shape"]
    return {
        "nothing": accuracy(torch.tensor([], dtype=torch.int64)),
        "colour units": accuracy((colour - shape).topk(ABLATED).indices),
        "shape units": accuracy((shape - colour).topk(ABLATED).indices),
        "random units": {c: float(np.mean([r[c] for r in random])) for c in ("colour", "shape")},
        "worst random": {c: float(np.min([r[c] for r in random])) for c in ("colour", "shape")},
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="tiny-clip,tiny-llava,tiny-sd,random,causal")
    parser.add_argument("--n", type=int, default=320)
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}
    for part in args.only.split(","):
        if part == "random":
            found[part] = at_random(args.n)
        elif part == "causal":
            found[part] = causal(max(args.n, 600))
        else:
            found[part] = table(part, args.n)
            head = ("method", "units", "detectors", *SHOWN, "AUROC", "one name for all")
            print(f"| {part} | " + " | ".join(head) + " |")
            for row in found[part]:
                cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in (row[h] for h in head)]
                print(f"| `{row['site']}` | " + " | ".join(cells) + " |", flush=True)
            continue
        print(json.dumps(found[part], indent=1), flush=True)
    return found


if __name__ == "__main__":
    main()
    sys.exit(0)
