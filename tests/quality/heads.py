"""Whether heads' names say what the heads do, on tiny-clip, beside chance.

python -m tests.quality.heads [MODEL] [--n 400] [--draws 3] [--seeds 3] [--level 0.01] [--split test]

Named: a head whose first text explains more variance than the same vocabulary turned at random does
(p <= level). Names are from validation scenes; what counts is measured on scenes of `--split`.

- "truly driven": of the heads of which one attribute explains more than 0.3 of the output (R2 of a regression
  on the true values), how often the first text, or any of the first three, is about that attribute;
- "ablated, direct" and "ablated, total": a head is held at its mean, on its direct path or in the running
  model; how often the attribute of which the zero-shot margin (the right text's cosine less the mean of the
  others') falls most is the one the head is named for. "total, direct heads" are those whose direct part
  correlates with the whole change at 0.5 or more; "total, by total effect" asks the same of the group along
  which the running model loses most (`head_effects` on validation scenes).

Nulls, by the same functions: heads' names dealt out among the heads (shuffled), and an untrained model (same
config, weights drawn anew). Intervals are 95 % by bootstrap, over draws of scenes and heads or seeds within.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.core.embed import embed, embed_texts
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.text_explanations.decomposition import decompose
from methods_multimodal.text_explanations.head_effects import head_effects
from methods_multimodal.text_explanations.name_heads import LEVEL, name_heads
from methods_multimodal.text_explanations.vocabulary import vocabulary
from mm_adapters.zoo import world
from mm_adapters.zoo.measures import images_of, prompts, value_of, values
from tests.quality.dissection import untrained

ATTRIBUTES = ("shape", "colour", "background", "position", "size", "texture")
# The share of a head's output that its attribute must explain to be the truth.
DRIVEN = 0.3
_APART = 1000


@dataclass(frozen=True)
class Heads:
    """Of each head, flat over layers: what it is named for, and what it does. Numbers are of ATTRIBUTES."""

    first: Tensor
    """[head]: what its first text is about."""
    three: Tensor
    """[head, attribute]: whether one of its first three texts is about it."""
    named: Tensor
    """[head]: whether its first text beats texts turned at random."""
    direct: Tensor
    """[head]: whether its direct part correlates with its whole effect."""
    by_effect: Tensor
    """[head]: along which attribute's texts the running model loses most."""
    r2: Tensor
    """[head, attribute]: how much of its output the attribute's true value explains."""
    lost_direct: Tensor
    """[head, attribute]: the fall of the margin on the direct path."""
    lost_total: Tensor
    """[head, attribute]: the fall of the margin in the running model."""


def measured(model: mm.HookedModel, n: int, draw: int, level: float = LEVEL, split: str = "test") -> Heads:
    """Everything the table is made of, for one model and one draw of scenes."""
    words = vocabulary("world")
    naming = [world.scene(i, "validation", seed=_APART * draw, kind="one") for i in range(n)]
    scenes = [world.scene(i, split, seed=_APART * (draw + 1), kind="one") for i in range(n)]
    pixels = model.prepare(images=images_of(naming))["pixel_values"]
    names = name_heads(model, pixels, words, n_texts=3, top=1, batch_size=100)
    effects = head_effects(model, pixels, words, batch_size=100)
    n_layers, n_heads = names.variance.shape
    each = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    number = {attribute: i for i, attribute in enumerate(ATTRIBUTES)}
    about = [[number[a] for a in names.about(*one)] for one in each]

    test = model.prepare(images=images_of(scenes))["pixel_values"]
    truth = truth_of(scenes)
    texts = {a: embed_texts(model, prompts(a)) for a in ATTRIBUTES}
    parts = decompose(model, images=test, tokens="sum", batch_size=100).unit()
    outputs = parts.heads[:, :, 0].flatten(1, 2)
    whole = margins(parts.own, texts, truth)
    direct = torch.stack(
        [whole - margins(parts.own - own + own.mean(0), texts, truth) for own in outputs.unbind(1)]
    )
    total = torch.stack([whole - margins(one, texts, truth) for one in ablated(model, test)])
    return Heads(
        first=torch.tensor([a[0] if a else -1 for a in about]),
        three=torch.tensor([[i in a for i in number.values()] for a in about]),
        named=torch.tensor([names.is_named(*one, level) for one in each]),
        direct=torch.tensor([effects.is_direct(*one) for one in each]),
        by_effect=torch.tensor([number[next(iter(effects.lost(*one)))] for one in each]),
        r2=torch.tensor([[explained(own, truth[a]) for a in ATTRIBUTES] for own in outputs.unbind(1)]),
        lost_direct=direct,
        lost_total=total,
    )


def truth_of(scenes: Sequence[world.Scene]) -> dict[str, Tensor]:
    """The number of each attribute's true value."""
    return {a: torch.tensor([values(a).index(value_of(s, a)) for s in scenes]) for a in ATTRIBUTES}


def margins(images: Tensor, texts: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """[attribute]: the right text's cosine less the mean of the others', averaged over images.

    `images` are not made of length one again, so that both kinds of ablation are measured alike.
    """
    found = []
    for attribute in ATTRIBUTES:
        cosines = images @ texts[attribute].T
        right = cosines.gather(1, truth[attribute][:, None])[:, 0]
        others = (cosines.sum(1) - right) / (cosines.shape[1] - 1)
        found.append((right - others).mean())
    return torch.stack(found)


def ablated(model: mm.HookedModel, pixels: Tensor) -> list[Tensor]:
    """Embeddings over the whole model's lengths, each head in turn held at its mean over these images.

    Written out with plain edits, apart from `head_effects`.
    """
    tower = model.towers["vision"]
    sites = [f"vision.blocks.{i}.attn.hook_z" for i in range(tower.n_layers())]
    parts = [{"pixel_values": part} for part in pixels.split(100)]
    runs = [model.run(part, read=sites) for part in parts]
    means = {s: torch.cat([run[s] for run in runs]).mean(0).detach() for s in sites}
    length = embed(model, pixels, "vision", 100).norm(dim=1, keepdim=True)
    found = []
    for site in sites:
        for head in range(means[site].shape[1]):

            def held(value: Tensor, site: str = site, head: int = head) -> Tensor:
                value = value.clone()
                value[:, :, head] = means[site][:, head]
                return value

            edit = [mm.Edit(site, held)]
            outputs = [tower.summary(model.run(part, edit=edit, read=[]).output).detach() for part in parts]
            found.append(torch.cat(outputs).float() / length)
    return found


def explained(outputs: Tensor, truth: Tensor) -> float:
    """R2 of a regression of outputs [image, width] on the attribute's values: of group means."""
    centred = outputs - outputs.mean(0)
    fitted = torch.zeros_like(centred)
    for value in truth.unique():
        fitted[truth == value] = centred[truth == value].mean(0)
    return 1 - float((centred - fitted).square().sum() / centred.square().sum().clamp_min(1e-30))


def rows(heads: Heads, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
    """Of each row of the table, whether it holds of each head it is about (1 or 0).

    With `rng` names are dealt out among the heads, each row's among those it is about.
    """
    truth = heads.r2.argmax(1)
    driven = heads.r2.amax(1) > DRIVEN
    every = torch.ones_like(heads.named)
    kinds = {
        "truly driven, first text": (heads.first, truth, driven),
        "truly driven, any of three": (heads.three, truth, driven),
        "ablated, direct, all heads": (heads.first, heads.lost_direct.argmax(1), every),
        "ablated, direct, named": (heads.first, heads.lost_direct.argmax(1), heads.named),
        "ablated, total, all heads": (heads.first, heads.lost_total.argmax(1), every),
        "ablated, total, named": (heads.first, heads.lost_total.argmax(1), heads.named),
        "ablated, total, named and direct": (
            heads.first,
            heads.lost_total.argmax(1),
            heads.named & heads.direct,
        ),
        "ablated, total, by total effect": (heads.by_effect, heads.lost_total.argmax(1), every),
    }
    found = {}
    for row, (name, right, which) in kinds.items():
        name, right = name[which], right[which]
        if rng is not None:
            name = name[torch.from_numpy(rng.permutation(len(name)))]
        found[row] = name[torch.arange(len(name)), right] if name.ndim == 2 else name == right
    return {row: value.double() for row, value in found.items()}


def table(
    at: str, n: int, *, draws: int = 3, seeds: int = 3, level: float = LEVEL, split: str = "test"
) -> dict[str, dict[str, Any]]:
    """Each row's share of heads with its interval; how many heads; the same of the nulls."""
    model = mm.load(at)
    trained = [measured(model, n, draw, level, split) for draw in range(draws)]
    random = [
        [measured(untrained(at, "tiny-clip", seed), n, draw, level, split) for seed in range(seeds)]
        for draw in range(draws)
    ]
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, Any]] = {}
    for row in rows(trained[0]):
        found[row] = {
            "heads": [len(rows(one)[row]) for one in trained],
            "share": _estimate([rows(one)[row] for one in trained]),
            "names dealt out": _estimate(
                [torch.cat([rows(one, rng)[row] for _ in range(50)]) for one in trained]
            ),
            "untrained": _estimate([torch.cat([rows(one)[row] for one in by]) for by in random]),
        }
    found["named at all"] = {
        "heads": [len(one.named) for one in trained],
        "share": _estimate([one.named.double() for one in trained]),
        "names dealt out": None,  # Whether a head is named does not depend on whose name it has.
        "untrained": _estimate([torch.cat([one.named.double() for one in by]) for by in random]),
    }
    return found


def _estimate(values: list[Tensor]) -> Estimate | None:
    kept = [value for value in values if len(value)]
    return bootstrap(kept, n_resamples=2000) if kept else None


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="tiny-clip", help="a folder or name")
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--level", type=float, default=LEVEL)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    args = parser.parse_args(argv)
    found = table(args.model, args.n, draws=args.draws, seeds=args.seeds, level=args.level, split=args.split)
    head = ("heads", "share", "names dealt out", "untrained")
    print("| | " + " | ".join(head) + " |\n|---|" + "---|" * len(head))
    for row, cells in found.items():
        text = [", ".join(map(str, cells["heads"]))]
        for key in head[1:]:
            value = cells[key]
            text.append("-" if value is None else f"{value.mean:.0%} [{value.low:.0%}, {value.high:.0%}]")
        print(f"| {row} | " + " | ".join(text) + " |", flush=True)
    return found


if __name__ == "__main__":
    main()
    sys.exit(0)
