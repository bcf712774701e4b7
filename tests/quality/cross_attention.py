"""Word maps, tracing and control on tiny-sd, judged by rules on pixels.

python -m tests.quality.cross_attention [--model tiny-sd] [--n 200] [--pairs 40] [--only maps,patch,...]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import sem
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.cross_attention import Case, WordEdit, edit_words, segment, word_maps
from methods_multimodal.cross_attention.tracing import generate_checked, knockout_edits, patch_edits
from mm_adapters.zoo import judges, measures, world

STEPS, GUIDANCE = 20, 3.0
OPTIONS = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
ATTRIBUTES = ("shape", "colour", "background", "size", "position")
TUNING = 40  # Prompts that the threshold is chosen on, and no number measured.


def region(image: Tensor) -> Tensor:
    """Where a picture, [3, height, width] in 0..1, is not its background: the drawn object."""
    pixels = np.asarray((image.permute(1, 2, 0) * 255).round()).astype(np.float32)
    frame = np.concatenate(
        [
            pixels[:2].reshape(-1, 3),
            pixels[-2:].reshape(-1, 3),
            pixels[:, :2].reshape(-1, 3),
            pixels[:, -2:].reshape(-1, 3),
        ]
    )
    return torch.tensor(np.linalg.norm(pixels - np.median(frame, axis=0), axis=-1) > 60.0)


def seen(image: Tensor) -> judges.Seen:
    """What the rules say a picture shows."""
    return judges.judge((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def prompts(n: int) -> list[tuple[world.Scene, str]]:
    return measures.prompts_to_draw(n)


# ---- word maps ---------------------------------------------------------------------------------


def measure_maps(model: Any, n: int, batch: int = 20) -> dict[str, Any]:
    """IoU and precision of the object word's map with what was drawn, by each recipe.

    Shuffled: the map of another prompt's object word, drawn from the same noise. Chance: that map
    against the picture of yet another prompt and noise.
    """
    cases = prompts(TUNING + n)
    recipes = ("mean", "daam", "spread")
    found: dict[str, list[Tensor]] = {r: [] for r in recipes}
    other: list[Tensor] = []
    regions: list[Tensor] = []
    n_other = n
    for start in range(0, len(cases), batch):
        rows = list(range(start, min(start + batch, len(cases))))
        texts, words = [cases[i][1] for i in rows], [[cases[i][0].things[0].shape] for i in rows]
        maps, output = _maps(model, texts, words, rows)
        for recipe in recipes:
            found[recipe] += list(maps.at(recipe)[:, 0])
        regions += [region(image) for image in output.images.float()]
        shuffled = [i for i in rows if TUNING <= i < TUNING + n_other]
        if shuffled:
            turned = [cases[TUNING + (i - TUNING + n_other // 2) % n_other] for i in shuffled]
            maps, _ = _maps(model, [t for _, t in turned], [[s.things[0].shape] for s, _ in turned], shuffled)
            other += list(maps.at("spread")[:, 0])
    live = [i for i, r in enumerate(regions) if r.any()]
    out: dict[str, Any] = {"prompts": len([i for i in live if i >= TUNING])}
    truth = torch.stack(regions)
    best = 0.0
    for recipe in recipes:
        maps_ = torch.stack(found[recipe])
        tuning, held = ([i for i in live if (i < TUNING) == t] for t in (True, False))
        best = segment(maps_[tuning], truth[tuning]).best
        held_out = segment(maps_[held], truth[held])
        out[f"IoU, {recipe}"] = held_out.mean_iou(best)
        out[f"precision, {recipe}"] = float(held_out.precision.mean())
        out[f"threshold, {recipe}"] = best
    rows = [i for i in range(n_other) if TUNING + i in live]
    wrong = segment(torch.stack([other[i] for i in rows]), truth[[TUNING + i for i in rows]])
    turned = torch.roll(truth[[TUNING + i for i in rows]], 7, 0)
    chance = segment(torch.stack([other[i] for i in rows]), turned)
    k = wrong.thresholds.index(best)
    gap = wrong.iou[k] - chance.iou[k]
    out |= {
        "IoU, shuffled": float(wrong.iou[k].mean()),
        "IoU, chance": float(chance.iou[k].mean()),
        "shuffled - chance, standard error": float(sem(gap.double().numpy())),
    }
    return out


def _maps(model: Any, texts: Sequence[str], words: Sequence[Sequence[str]], seeds: Sequence[int]):
    inputs = {**OPTIONS, "prompt": list(texts), "seed": list(seeds), "output_type": "pt"}
    return word_maps(model, inputs, words=words, keep=("head",), spread=True)


# ---- tracing -----------------------------------------------------------------------------------


def pairs(attribute: str, n: int) -> list[tuple[Case, world.Scene]]:
    """Prompts that differ in one attribute's word."""
    rng = np.random.default_rng(0)
    out = []
    for i, (scene, text) in enumerate(prompts(n)):
        word = measures.value_of(scene, attribute)
        new = str(rng.choice([v for v in measures.values(attribute) if v != word]))
        out.append((Case(text, word, _swap(text, word, new), new, i), scene))
    return out


def _swap(text: str, word: str, new: str) -> str:
    for a in ("a", "an"):
        article = "an" if new[0] in "aeiou" else "a"
        if text.startswith(f"{a} {word} "):
            return f"{article} {new} " + text.removeprefix(f"{a} {word} ")
    return text.replace(f" {word} ", f" {new} ", 1) if f" {word} " in text else text.replace(word, new, 1)


def measure_patching(model: Any, attribute: str, n: int) -> dict[str, Any]:
    """How often patching a word's keys and values flips its attribute, and leaves the others."""
    cases = pairs(attribute, n)
    at = {"word": "word", "to its noun": None, "after": "after"}
    table: dict[str, list[tuple[bool, list[bool]]]] = {k: [] for k in ("goal", *at, "random word")}
    rng = np.random.default_rng(1)
    for case, scene in cases:
        noun = scene.things[0].shape if attribute in ("colour", "size") else case.word
        noun = "background" if attribute == "background" else noun
        changes = []
        for row, positions in enumerate(at.values(), start=2):
            changes += patch_edits(model, case, row, 1, positions=positions or noun)
        unused = str(rng.choice([w for w in case.prompt.split() if w not in (case.word, "a", "an")]))
        changes += patch_edits(model, Case(case.prompt, unused, case.other, unused), 5, 1, positions="word")
        rows = [case.prompt, case.other, *[case.prompt] * 4]
        images = generate_checked(model, rows, case.seed, changes, OPTIONS)
        base, *others = [seen(image) for image in images]
        for name, got in zip(table, others, strict=True):
            kept = [getattr(got, a) == getattr(base, a) for a in ATTRIBUTES if a != attribute]
            table[name].append((getattr(got, attribute) == case.other_word, kept))
    return {
        name: {
            "flipped": float(np.mean([f for f, _ in rows])),
            "others kept": float(np.mean([k for _, k in rows])),
        }
        for name, rows in table.items()
    } | {"pairs": len(cases)}


def measure_knockout(model: Any, attribute: str, n: int) -> dict[str, Any]:
    """How often blocking a word takes its attribute away, and blocking another word does."""
    cases = pairs(attribute, n)
    rng = np.random.default_rng(2)
    gone: dict[str, list[bool]] = {"word": [], "pixels only": [], "random word": []}
    for case, _ in cases:
        said = {case.word, "a", "an"}
        unused = str(rng.choice([w for w in case.prompt.split() if w not in said]))
        changes = [
            *knockout_edits(model, case, 1),
            *knockout_edits(model, case, 2, text=False),
            *knockout_edits(model, Case(case.prompt, unused), 3),
        ]
        images = generate_checked(model, [case.prompt] * 4, case.seed, changes, OPTIONS)
        base, *others = [getattr(seen(image), attribute) for image in images]
        if base != case.word:
            continue  # What was never drawn cannot be taken away.
        for name, got in zip(gone, others, strict=True):
            gone[name].append(got != base)
    return {f"gone, {name}": float(np.mean(rows)) for name, rows in gone.items()} | {
        "pictures": len(gone["word"])
    }


# ---- control -----------------------------------------------------------------------------------


def measure_control(model: Any, n: int) -> dict[str, Any]:
    """Whether an edit does what it says and leaves the rest as it was."""
    weights = (0.0, 0.5, 1.0, 2.0, 4.0)
    flipped, kept, refined, moved = [], [], [], []
    for case, scene in pairs("colour", n):
        short = case.prompt.replace(f"{scene.things[0].size} ", "", 1)
        plain = edit_words(
            model,
            case.prompt,
            [
                WordEdit(case.other, "replace", cross=0.4, own=0.4),
                *[WordEdit(case.prompt, None, own=0.0, weights={"background": w}) for w in weights],
            ],
            n_steps=STEPS,
            seed=case.seed,
            options={"guidance_scale": GUIDANCE},
        )
        more = edit_words(
            model,
            short,
            [WordEdit(case.prompt, "refine", own=0.4)],
            n_steps=STEPS,
            seed=case.seed,
            options={"guidance_scale": GUIDANCE},
        )
        base, new = seen(plain[0]), seen(plain[1])
        flipped.append(new.colour == case.other_word)
        kept.append([getattr(new, a) == getattr(base, a) for a in ATTRIBUTES if a != "colour"])
        was, now = seen(more[0]), seen(more[1])
        refined.append([getattr(now, a) == getattr(was, a) for a in ATTRIBUTES if a != "size"])
        apart = (plain[2:] - plain[0]).square().mean((1, 2, 3)).sqrt()
        moved.append(apart.tolist())
    change = np.array(moved)
    return {
        "replace: colour flipped": float(np.mean(flipped)),
        "replace: others kept": float(np.mean(kept)),
        "refine: others kept": float(np.mean(refined)),
        "reweight: weights": list(weights),
        "reweight: change by weight": [round(float(x), 4) for x in change.mean(0)],
        "reweight: pictures where it grows away from 1": float(
            np.mean([(r[0] >= r[1] >= r[2] == 0.0) and (r[2] <= r[3] <= r[4]) for r in moved])
        ),
        "pictures": len(moved),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--n", type=int, default=200, help="prompts for the maps")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of prompts for each attribute")
    parser.add_argument("--only", default="maps,patch,knockout,control")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = mm.load(args.model)
    model.wrapped.set_progress_bar_config(disable=True)
    jobs: dict[str, Callable[[], Any]] = {"maps": lambda: measure_maps(model, args.n)}
    for a in ("colour", "background", "size", "shape"):
        jobs[f"patch {a}"] = lambda a=a: measure_patching(model, a, args.pairs)
    for a in ("colour", "background", "size", "shape"):
        jobs[f"knockout {a}"] = lambda a=a: measure_knockout(model, a, args.pairs)
    jobs["control"] = lambda: measure_control(model, args.pairs)
    out: dict[str, Any] = {}
    for name, job in jobs.items():
        if name.split()[0] in args.only.split(","):
            start = time.process_time()
            out[name] = job()
            print(name, json.dumps(out[name]), f"({time.process_time() - start:.0f} s)", flush=True)
    return out


if __name__ == "__main__":
    main(sys.argv[1:])
