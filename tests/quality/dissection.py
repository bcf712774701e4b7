"""How many units of each layer detect what, whether held-out pictures agree, and whether it matters.

python -m tests.quality.dissection [--only tiny-clip,tiny-llava,tiny-sd,chance,causal] [--at FOLDER]
    [--n 320] [--draws 3] [--seeds 2]

Each count stands beside the same function's on an untrained twin (same config, weights drawn anew; several
seeds), on the tower with its weights shuffled, and on shuffled labels (each picture given another's masks and
shown to the judge as another). Intervals are 95 %, by bootstrap over draws of scenes and, of the nulls, over
seeds within each.
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
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.dissection import Concepts, Units, twins_of
from methods_multimodal.dissection.concepts import Masks
from methods_multimodal.dissection.survey import Survey, survey
from mm_adapters.zoo import drawing, judges, labels, measures, world
from tests.quality.cross_attention import region

CONCEPTS = Concepts(labels.NAMES, labels.MEMBER_OF)
SHOWN = ("shape", "colour", "background", "position")
METHODS = ("network", "wpmi")
SITES = {
    "tiny-clip": [f"vision.blocks.{i}.mlp.hook_post" for i in range(4)],
    "tiny-llava": [f"language.blocks.{i}.mlp.hook_post" for i in range(4)],
    "tiny-sd": [f"denoiser.resnets.{i}.hook_out" for i in (1, 3, 4, 5, 7)],
}
# Seeds of scenes of a draw, so that draws share none.
_APART = 1000

Batch = tuple[Mapping[str, Any], Sequence[Any]]


def seen_batches(name: str, n: int, draw: int = 0, size: int = 32) -> tuple[list[Batch], list[Masks]]:
    """Pictures of the world as the model's inputs, and what they show."""
    scenes = [world.scene(i, "validation", seed=_APART * draw, kind="one") for i in range(n)]
    pictures = measures.images_of(scenes)
    text = ["what is this?"] if name == "tiny-llava" else ["a"]
    parts = [pictures[i : i + size] for i in range(0, n, size)]
    batches: list[Batch] = [
        ({"images": p, "text": text * (len(p) if name == "tiny-llava" else 1)}, p) for p in parts
    ]
    return batches, [labels.masks_of(scene) for scene in scenes]


def drawn_batches(
    model: mm.HookedModel, n: int, steps: int, draw: int = 0, size: int = 16
) -> tuple[list[Batch], list[Masks]]:
    """Pictures that tiny-sd draws, and what rules on their pixels see in them."""
    cases = drawing.prompts_to_draw(n * (draw + 1))[n * draw :]
    batches: list[Batch] = []
    masks: list[Masks] = []
    for first in range(0, n, size):
        rows = range(first, min(first + size, n))
        inputs = {
            "prompt": [cases[i][1] for i in rows],
            "seed": [_APART * draw + i for i in rows],
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


def untrained(at: str, name: str, seed: int) -> mm.HookedModel:
    """The model of the same config with weights drawn anew, by its library's own initialisation."""
    model = mm.load(at)
    whole = model.wrapped.unet if name == "tiny-sd" else model.wrapped
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(whole).from_config(whole.config) if name == "tiny-sd" else type(whole)(whole.config)
    whole.load_state_dict(fresh.state_dict())
    return model


def shuffled(batches: list[Batch], masks: list[Masks], seed: int) -> tuple[list[Batch], list[Masks]]:
    """The same inputs, each with another picture's masks and picture."""
    order = np.random.default_rng(seed).permutation(len(masks)).tolist()
    pictures = [picture for _, shown in batches for picture in shown]
    out: list[Batch] = []
    first = 0
    for inputs, shown in batches:
        out.append((inputs, [pictures[order[first + i]] for i in range(len(shown))]))
        first += len(shown)
    return out, [masks[i] for i in order]


def surveyed(units: Units, batches: list[Batch], masks: list[Masks], judge: mm.HookedModel) -> Survey:
    """The same questions for every row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        return survey(
            units,
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


def counts(found: Survey, random: Sequence[Survey], method: str) -> dict[str, float]:
    """One row: detectors, by category, those above what one in a hundred of `random` reaches, and AUROC."""
    one = found.by_name(method)
    assert one.faithful is not None
    kept = one.chance.significant()
    of = [CONCEPTS.categories[CONCEPTS.index(one.names[u])] for u in kept]
    row = {
        "units": float(len(one.names)),
        "detectors": float(len(kept)),
        **{c: float(of.count(c)) for c in SHOWN},
    }
    if random:
        scores = torch.cat([other.by_name(method).scores for other in random]).double()
        threshold = scores.quantile(0.99, interpolation="higher")
        row["above random"] = float((one.scores.double() > threshold).sum())
    row |= {"AUROC": _mean(one.faithful.auroc[kept]), "one name for all": _mean(one.faithful.constant[kept])}
    return row


def table(
    name: str, n: int, at: str | None = None, *, draws: int = 3, seeds: int = 2, steps: int = 8
) -> list[dict[str, Any]]:
    """Per layer, method and kind of weights or labels: the counts, each an `Estimate` over draws and seeds.

    The untrained units whose best 1 % set the threshold of "above random" are of one half of the seeds'
    twins; the row "untrained" counts those of the other half, so that it is no identity (0 seeds: without).
    """
    at, judge = at or name, mm.load("tiny-clip")
    model = mm.load(at)
    twins = [untrained(at, name, seed) for seed in range(2 * seeds)]
    if name == "tiny-sd":
        for one in (model, *twins):
            one.wrapped.set_progress_bar_config(disable=True)
    rows: dict[tuple[str, str, str], dict[str, list[list[float]]]] = {}
    for draw in range(draws):
        batches, masks = (
            drawn_batches(model, n // 2, steps, draw) if name == "tiny-sd" else seen_batches(name, n, draw)
        )
        for site in SITES[name]:
            units = Units(model, site)
            found = surveyed(units, batches, masks, judge)
            fresh = [surveyed(Units(twin, site), batches, masks, judge) for twin in twins]
            setting, counted = fresh[:seeds], fresh[seeds:]
            mixed = [surveyed(twin, batches, masks, judge) for twin in twins_of(units, seeds, draw * seeds)]
            other = [
                surveyed(units, *shuffled(batches, masks, seed + draw * seeds), judge)
                for seed in range(max(1, seeds))
            ]
            kinds = (("trained", [found]), ("untrained", counted), ("weights shuffled", mixed))
            for method in METHODS:
                for kind, results in (*kinds, ("labels shuffled", other)):
                    each = [counts(one, setting, method) for one in results]
                    into = rows.setdefault((site, method, kind), {})
                    for key in each[0] if each else ():
                        into.setdefault(key, []).append([row[key] for row in each])
    return [
        {"site": site, "method": method, "weights": kind}
        | {key: estimate(values) for key, values in row.items()}
        for (site, method, kind), row in rows.items()
        if row
    ]


def estimate(values: list[list[float]]) -> Estimate:
    """The mean over draws, and its interval; draws without a value (no detector, no AUROC) are left out."""
    kept = [torch.tensor([v for v in row if v == v]) for row in values]
    kept = [row for row in kept if len(row)]
    if not kept:
        return Estimate(float("nan"), float("nan"), float("nan"), torch.tensor([]))
    return bootstrap(kept, n_resamples=2000)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")


def at_chance(n: int, at: str = "tiny-clip") -> dict[str, float]:
    """The untrained tiny-clip on units shuffled each in an order of its own, beside the level asked.

    True by construction of the permutation test, if it is right: nothing relates such units to pictures.
    """
    from methods_multimodal.dissection.scores import chance
    from methods_multimodal.dissection.similarity import cosine

    model, judge = untrained(at, "tiny-clip", 0), mm.load(at)
    batches, _ = seen_batches("tiny-clip", n)
    units = Units(model, "vision.blocks.3.mlp.hook_post")
    own = torch.cat([units.pooled(inputs) for inputs, _ in batches])
    with torch.no_grad():
        seen = torch.cat([judge.embed(images=list(p)) for _, p in batches])
        said = judge.embed(text=[labels.caption_of(c) for c in CONCEPTS.names])
    similarity = torch.nn.functional.normalize(seen, dim=1) @ torch.nn.functional.normalize(said, dim=1).T
    kept = chance(lambda order: cosine(similarity[order], own), n, n_shuffles=99)
    rng = torch.Generator().manual_seed(0)
    mixed = torch.stack([column[torch.randperm(n, generator=rng)] for column in own.T], 1)
    null = chance(lambda order: cosine(similarity[order], mixed), n, n_shuffles=99)
    return {
        "share with p <= 0.05, shuffled": float((null.p <= 0.05).float().mean()),
        "detectors, shuffled": len(null.significant()) / mixed.shape[1],
        "detectors, as the random weights are": len(kept.significant()) / own.shape[1],
    }


def matched(named: Sequence[int], others: Sequence[int], size: Tensor, rng: np.random.Generator) -> list[int]:
    """For each named unit another of the nearest size, each taken once; who takes first is drawn."""
    free = list(others)
    taken = []
    for unit in rng.permutation(np.asarray(named)).tolist():
        nearest = min(free, key=lambda other: abs(float(size[other] - size[unit])))
        free.remove(nearest)
        taken.append(nearest)
    return taken


def causal(
    n: int, at: str = "tiny-clip", *, draws: int = 3, sets: int = 4, categories: Sequence[str] = SHOWN
) -> dict[str, dict[str, Any]]:
    """Zero-shot accuracy of tiny-clip without exactly the MLP neurons that the table names for a category.

    Units are the detectors of `table` (method "network"), in all four layers, held at their means over
    pictures and places. A control set has as many units of the same layers, each the nearest in the logarithm
    of its mean square, that are named for another category or not at all. Where a layer has more named units
    than others, the surest of them are taken; "ablated" and "named" say how many. `lost` is the accuracy lost
    beyond the control's, in each category; accuracy is on test scenes, names are from validation scenes.
    """
    model, judge = mm.load(at), mm.load("tiny-clip")
    sites = SITES["tiny-clip"]
    lost: dict[str, dict[str, list[list[float]]]] = {c: {o: [] for o in categories} for c in categories}
    plain: dict[str, dict[str, list[list[float]]]] = {c: {o: [] for o in categories} for c in categories}
    sizes: dict[str, list[tuple[int, int]]] = {c: [] for c in categories}
    for draw in range(draws):
        batches, masks = seen_batches("tiny-clip", n, draw)
        layers = [surveyed(Units(model, site), batches, masks, judge).by_name("network") for site in sites]
        means, squares = _activations(model, sites, batches)
        scenes = [world.scene(i, "test", seed=_APART * draw, kind="one") for i in range(n)]
        pictures = measures.images_of(scenes)
        prepared = [model.prepare(text=["a"], images=pictures[i : i + 50]) for i in range(0, n, 50)]

        def accuracy(
            units: Sequence[Sequence[int]],
            prepared: Any = prepared,
            scenes: Any = scenes,
            means: Any = means,
        ) -> dict[str, float]:
            edits = [mm.Edit(s, _Held(m, u)) for s, m, u in zip(sites, means, units, strict=True) if len(u)]
            with torch.no_grad():
                runs = [model.run(inputs, edit=edits, read=[]) for inputs in prepared]
            return _accuracy(model, torch.cat([run.output.image_embeds for run in runs]), scenes, categories)

        whole = accuracy([[]] * len(sites))
        for category in categories:
            chosen, rest = _of_category(layers, category)
            sizes[category].append((sum(map(len, chosen)), _named_for(layers, category)))
            without = accuracy(chosen)
            per_set = []
            for number in range(sets):
                rng = np.random.default_rng((draw, number))
                control = [matched(u, o, q, rng) for u, o, q in zip(chosen, rest, squares, strict=True)]
                per_set.append(accuracy(control))
            for other in categories:
                plain[category][other].append([whole[other] - without[other]])
                lost[category][other].append([one[other] - without[other] for one in per_set])
    return {
        category: {
            "ablated, named": sizes[category],
            "lost": {o: estimate(v) for o, v in plain[category].items()},
            "lost beyond the control": {o: estimate(v) for o, v in lost[category].items()},
        }
        for category in categories
    }


class _Held:
    """Holds some units at their means."""

    def __init__(self, means: Tensor, units: Sequence[int]) -> None:
        self._means, self._units = means, list(units)

    def __call__(self, value: Tensor) -> Tensor:
        held = value.clone()
        held[..., self._units] = self._means[self._units].to(held)
        return held


def _activations(model: mm.HookedModel, sites: list[str], batches: list[Batch]) -> tuple[list, list]:
    """Each site's units' means over pictures and places, and the logarithm of their mean squares."""
    reads = [mm.Read(s, reduce=lambda v: v.detach().flatten(0, 1)) for s in sites]
    runs = [model.run(inputs, read=reads) for inputs, _ in batches]
    values = [torch.cat([run[s] for run in runs]) for s in sites]
    return [v.mean(0) for v in values], [v.square().mean(0).clamp_min(1e-12).log() for v in values]


def _of_category(layers: list[Any], category: str) -> tuple[list[list[int]], list[list[int]]]:
    """Per layer, the units to ablate, surest first and at most half of it, and all not so named."""
    chosen, rest = [], []
    for one in layers:
        kept = set(one.chance.significant())
        named = [u for u in sorted(kept) if CONCEPTS.categories[CONCEPTS.index(one.names[u])] == category]
        others = [u for u in range(len(one.names)) if u not in set(named)]
        named.sort(key=lambda u: -float(one.scores[u]))
        chosen.append(named[: len(others)])
        rest.append(others)
    return chosen, rest


def _named_for(layers: list[Any], category: str) -> int:
    return sum(
        CONCEPTS.categories[CONCEPTS.index(one.names[u])] == category
        for one in layers
        for u in one.chance.significant()
    )


def _accuracy(
    model: mm.HookedModel, images: Tensor, scenes: Sequence[world.Scene], categories: Sequence[str]
) -> dict[str, float]:
    right = {}
    for category in categories:
        texts = model.embed(text=measures.prompts(category)).detach()
        named = (images @ torch.nn.functional.normalize(texts, dim=1).T).argmax(1).tolist()
        truth = [measures.values(category).index(measures.value_of(s, category)) for s in scenes]
        right[category] = float(np.mean([a == b for a, b in zip(named, truth, strict=True)]))
    return right


def shown(value: Any, digits: int = 0) -> str:
    """An estimate with its interval, as a cell."""
    if isinstance(value, Estimate):
        return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return str(value)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="tiny-clip,tiny-llava,tiny-sd,chance,causal")
    parser.add_argument("--at", help="a folder or name to load in place of the zoo's; for one part of --only")
    parser.add_argument("--n", type=int, default=320)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}
    for part in args.only.split(","):
        if part == "chance":
            found[part] = at_chance(args.n, args.at or "tiny-clip")
            print(json.dumps(found[part], indent=1), flush=True)
        elif part == "causal":
            found[part] = causal(max(args.n, 320), args.at or "tiny-clip", draws=args.draws)
            print("| named for | ablated, named | lost of | " + " | ".join(SHOWN) + " |")
            for category, row in found[part].items():
                for what in ("lost", "lost beyond the control"):
                    cells = [shown(row[what][o], 3) for o in SHOWN]
                    print(f"| {category} | {row['ablated, named']} | {what} | " + " | ".join(cells) + " |")
        else:
            found[part] = table(part, args.n, args.at, draws=args.draws, seeds=args.seeds)
            head = ("method", "weights", "units", "detectors", *SHOWN, "above random")
            print(f"| {part} | " + " | ".join((*head, "AUROC", "one name for all")) + " |")
            for row in found[part]:
                cells = [shown(row.get(h, "-")) for h in head]
                cells += [shown(row[h], 2) for h in ("AUROC", "one name for all")]
                print(f"| `{row['site']}` | " + " | ".join(cells) + " |", flush=True)
    return found


if __name__ == "__main__":
    main()
    sys.exit(0)
