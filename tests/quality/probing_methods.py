"""What code lengths, few dimensions, shares and prompts say of the zoo, beside untrained twins and chance.

python -m tests.quality.probing_methods [--only codes,dimensions,shares,prompts] [--n 300] [--draws 3]

Every line is a mean over draws (new scenes, new twin) with its 95 % interval by bootstrap over draws, and
over pictures within where there are such.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import mm_adapters as mm
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.probing import (
    Place,
    code_length,
    find_dimensions,
    modality_shares,
    prompt_probe,
    read_features,
)
from mm_adapters.zoo import measures
from tests.quality import probing_data as data

PLACES = {
    "tiny-clip, class": ("tiny-clip", data.pictures, Place("vision.blocks.3.hook_resid_post", "class")),
    "tiny-clip, end": ("tiny-clip", data.captions, Place("text.blocks.3.hook_resid_post", "end")),
    "tiny-llava, last": ("tiny-llava", data.questions, Place("language.blocks.3.hook_resid_post", "last")),
}
VARIABLES = ("shape", "colour", "position", "size", data.NOTHING)
TEMPLATES = {
    "shape": ("a photo of a {}", "a {}"),
    "colour": ("a photo of a {} object", "a {} thing"),
    "position": ("a photo of an object in the {}", "a thing in the {}"),
    "size": ("a photo of a {} object", "a {} thing"),
}
QUESTIONS = {
    "shape": "<image>\nquestion: what shape is the object? answer:",
    "colour": "<image>\nquestion: what colour is the object? answer:",
    "position": "<image>\nquestion: where is the object? answer:",
}


def codes(n: int, draws: int) -> list[tuple[str, ...]]:
    """How many times shorter than uniform the labels' code is, of the model and of untrained twins."""
    lines: list[tuple[str, ...]] = [
        ("place", "variable", "compression", "shuffled labels", "untrained", "trained less untrained")
    ]
    for where, (name, inputs, place) in PLACES.items():
        found: dict[tuple[str, str], list[list[float]]] = {}
        for draw in range(draws):
            asked = data.asked(inputs, "one", n, draw)
            for kind, model in (("trained", mm.load(name)), ("untrained", data.untrained(name, draw + 1))):
                rows = read_features(model, asked.batches, sites=[place.site], roles=(place.role,)).at(place)
                for variable in VARIABLES:
                    code = code_length(rows, asked.labels[variable], n_orders=1, seed=draw)
                    found.setdefault((variable, kind), []).append([code.compression.mean])
                    shuffled = code.shuffled_compression.mean
                    found.setdefault((variable, f"{kind} shuffled"), []).append([shuffled])
        for variable in VARIABLES:
            own, other, shuffled = (
                torch.tensor(found[variable, kind]) for kind in ("trained", "untrained", "trained shuffled")
            )
            cells = [shown(bootstrap(x, n_resamples=2000)) for x in (own, shuffled, other)]
            above = shown(bootstrap(own, than=other, n_resamples=2000), "+")
            lines.append((where, variable, *cells, above))
    return lines


def dimensions(n: int, draws: int) -> list[tuple[str, ...]]:
    """How much the best 2, 5 and 10 dimensions get right, and as many random ones."""
    lines: list[tuple[str, ...]] = [
        ("place", "variable", "k", "accuracy", "random dimensions", "above random")
    ]
    for where, (name, inputs, place) in PLACES.items():
        found: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for draw in range(draws):
            asked = data.asked(inputs, "one", n, draw)
            rows = read_features(mm.load(name), asked.batches, sites=[place.site], roles=(place.role,)).at(
                place
            )
            for variable in ("shape", "colour", "position", data.NOTHING):
                probe = find_dimensions(rows, asked.labels[variable], 10, seed=draw)
                for k in (2, 5, 10):
                    own, random = probe.right[k - 1].double(), probe.random_accuracy[:, k - 1].double()
                    found.setdefault((variable, k), []).append((own, random))
        for (variable, k), values in found.items():
            own, random = (torch.stack([value[i] for value in values]) for i in (0, 1))
            above = bootstrap(own, than=random, paired_draws=False, n_resamples=2000)
            cells = [shown(bootstrap(x, n_resamples=2000), digits=2) for x in (own, random)]
            lines.append((where, variable, str(k), *cells, shown(above, "+", 2)))
    return lines


def shares(n: int, draws: int) -> list[tuple[str, ...]]:
    """The words' share of a prediction, of the trained model and of untrained twins."""
    lines: list[tuple[str, ...]] = [
        ("model", "share of the words", "untrained", "if all tokens mattered alike")
    ]
    for name in ("tiny-clip", "tiny-llava"):
        found: dict[str, list[torch.Tensor]] = {}
        for draw in range(draws):
            scenes = data.scenes_of("one", max(4, n // 20), draw)
            if name == "tiny-clip":
                texts = [f"a {s.things[0].colour} {s.things[0].shape}" for s in scenes]
            else:
                texts = [
                    f"<image>\nquestion: what colour is the {s.things[0].shape}? answer:" for s in scenes
                ]
            pairs = zip(measures.images_of(scenes), texts, strict=True)
            items = [{"images": [picture], "text": [text]} for picture, text in pairs]
            for kind, model in (("trained", mm.load(name)), ("untrained", data.untrained(name, draw + 1))):
                record = modality_shares(model, items, n_orders=16, seed=draw)
                found.setdefault(kind, []).append(record.text_share)
                found.setdefault("alike", []).append(record.text_players)
        cells = [
            shown(bootstrap(torch.stack(found[k]), n_resamples=2000), digits=2)
            for k in ("trained", "untrained")
        ]
        lines.append((name, *cells, f"{float(torch.stack(found['alike']).mean()):.2f}"))
    return lines


def prompts(n: int, draws: int) -> list[tuple[str, ...]]:
    """How often the model's own answer in words is right."""
    lines: list[tuple[str, ...]] = [("model", "variable", "accuracy", "centred", "by chance", "untrained")]
    for name, asked_by in (("tiny-clip", TEMPLATES), ("tiny-llava", QUESTIONS)):
        for variable, texts in asked_by.items():
            found: dict[str, list[torch.Tensor]] = {}
            for draw in range(draws):
                scenes = data.scenes_of("one", n // 2, draw)
                labels = [measures.value_of(s, variable) for s in scenes]
                pictures = measures.images_of(scenes)
                twin = data.untrained(name, draw + 1)
                record, null = (prompt_probe(m, pictures, labels, texts) for m in (mm.load(name), twin))
                found.setdefault("own", []).append(record.right.double())
                found.setdefault("centred", []).append(record.calibrated.right.double())
                found.setdefault("null", []).append(null.right.double())
                found.setdefault("chance", []).append(torch.tensor([record.shuffled_accuracy]))
            cells = [
                shown(bootstrap(torch.stack(found[key]), n_resamples=2000), digits=2)
                for key in ("own", "centred", "chance", "null")
            ]
            lines.append((name, variable, *cells))
    return lines


def shown(of: Estimate, sign: str = "", digits: int = 1) -> str:
    """An estimate with its interval."""
    mean, low, high = (format(x, f"{sign}z.{digits}f") for x in (of.mean, of.low, of.high))
    return f"{mean} [{low}, {high}]"


TABLES: dict[str, Callable[[int, int], list[tuple[str, ...]]]] = {
    "codes": codes,
    "dimensions": dimensions,
    "shares": shares,
    "prompts": prompts,
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(TABLES))
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--draws", type=int, default=3)
    args = parser.parse_args(argv)
    found = {}
    for name in args.only.split(","):
        found[name] = TABLES[name](args.n, args.draws)
        head, *rest = found[name]
        rule = "|" + "---|" * len(head)
        print(f"### {name}\n")
        print("\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(r) + " |" for r in rest)]))
        print(flush=True)
    return found


if __name__ == "__main__":
    main()
    sys.exit(0)
