"""Words on a drawing model, judged by rules on pixels: every number beside its null, with intervals.

python -m tests.quality.cross_attention [MODEL] [--n 60] [--pairs 16] [--causal 16] [--draws 2] [--only maps]

prints each table as JSON and as it stands on a page. `maps` and `two`: overlap of words' maps with what was
drawn; `truth`: with the pixels that change; `patch`, `knockout`, `control`: what an intervention does beside
its matched control.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import mm_adapters as mm
from methods_multimodal.cross_attention import Case, WordEdit, edit_words
from methods_multimodal.cross_attention._rows import RowEdit, copy_positions
from methods_multimodal.cross_attention._sites import text_attention
from methods_multimodal.cross_attention._turned import turned
from methods_multimodal.cross_attention.cases import (
    align_positions,
    layouts_of,
    matched_words,
    positions_of_word,
)
from methods_multimodal.cross_attention.generation import generate_checked
from methods_multimodal.cross_attention.tracing import knockout_edits
from mm_adapters.zoo import judges
from tests.quality.prompts import ATTRIBUTES, GUIDANCE, STEPS, pairs, region, seen
from tests.quality.rows import Row, markdown, row
from tests.quality.word_maps import measure_maps, measure_truth, measure_two, noise

__all__ = ["main", "region", "seen"]

CHANGED = ("colour", "background", "size", "shape")
NAN = float("nan")
# Values of one kind, by name, then [prompt][draw].
Table = dict[str, list[list[float]]]
Options = dict[str, Any]


def filled(table: Table, n: int, draws: int, names: Sequence[str]) -> None:
    for name in names:
        table[name] = [[NAN] * draws for _ in range(n)]


# ---- patching ----------------------------------------------------------------------------------


def positions_patched(model: Any, case: Case, noun: str, rng: torch.Generator) -> dict[str, Sequence[int]]:
    """Where another word's keys and values are put, by the name of the row."""
    ((layout, _),) = layouts_of(model, [case])
    word = positions_of_word(layout, case.word, "word")
    after = positions_of_word(layout, case.word, "after")
    where: dict[str, Sequence[int]] = {"the word and all after it": after, "the word's own tokens": word}
    if noun != case.word:
        where["from the word to its noun"] = positions_of_word(layout, case.word, noun)
        where["its noun alone"] = positions_of_word(layout, noun, "word")
    last = max(positions_of_word(layout, case.word, noun))
    where["all after the noun"] = [p for p in after if p > last]
    words = matched_words(layout, case.word)
    if words and layout.where(words[0])[0] > word[-1]:
        other = words[int(torch.randint(len(words), (), generator=rng))]
        where["as many tokens of another word after it"] = layout.where(other)
    return where


def put(model: Any, case: Case, row_: int, to: Sequence[int], donor: int = 1) -> list[RowEdit]:
    """Gives a row the keys and values of the other prompt at these positions, at every layer and step."""
    ((layout, other),) = layouts_of(model, [case])
    assert other is not None
    ours, theirs = align_positions(layout, other, case.word, case.other_word, "after")
    source = dict(zip(ours, theirs, strict=True))
    return [
        RowEdit(layer.site(kind), row_, copy_positions(donor, to, [source[p] for p in to]))
        for layer in text_attention(model, layout=layout)
        for kind in ("k", "v")
    ]


def as_many_tokens(model: Any, case: Case) -> bool:
    """Whether both prompts have the same number: then everything from the word on is the other prompt."""
    tokenizer = model.tokenizer_of("text")
    one, other = (len(tokenizer(prompt).input_ids) for prompt in (case.prompt, case.other))
    return one == other


def measure_patching(
    model: Any, attribute: str, n: int, draws: int, options: Options
) -> tuple[list[Row | None], dict[str, Any]]:
    """How often another word's keys and values flip its attribute, beside the same change turned."""
    cases = pairs(attribute, n)
    flipped: Table = {}
    kept: Table = {}
    rng = torch.Generator().manual_seed(1)
    same: list[bool] = []
    for i, (case, scene) in enumerate(cases):
        noun = {"background": "background", "shape": case.word}.get(attribute, scene.things[0].shape)
        where = positions_patched(model, case, noun, rng)
        names = ["the other prompt", *where, *(f"{name}, turned" for name in where)]
        for table in (flipped, kept):
            filled(table, n, draws, [name for name in names if name not in table])
        for draw in range(draws):
            edits: list[RowEdit] = []
            for j, to in enumerate(where.values()):
                edits += put(model, case, 2 + j, to)
                control = 2 + len(where) + j
                edits += turned(put(model, case, control, to), control, i, draw)
            rows = [case.prompt, case.other, *[case.prompt] * (2 * len(where))]
            images = generate_checked(model, rows, noise(i, draw), edits, options)
            if as_many_tokens(model, case):
                same.append(bool((images[2] - images[1]).abs().max() < 0.5 / 255))
            base, *others = [seen(image) for image in images]
            for name, got in zip(names, others, strict=True):
                flipped[name][i][draw] = float(getattr(got, attribute) == case.other_word)
                kept[name][i][draw] = share_kept(base, got, attribute)
    rows_: list[Row | None] = []
    for name in flipped:
        if name.endswith(", turned"):
            continue
        note = ""
        if name == "the word and all after it":
            note = (
                f"the same picture as the other prompt's in {sum(same)} of {len(same)} whose prompts have "
                "as many tokens: by construction"
            )
        null = {"the same change turned": flipped[f"{name}, turned"]} if f"{name}, turned" in flipped else {}
        rows_.append(row(f"{attribute} flips: {name}", flipped[name], null, note))
        null = {"the same change turned": kept[f"{name}, turned"]} if null else {}
        rows_.append(row(f"the rest stays: {name}", kept[name], null, note))
    word = "the word's own tokens"
    elsewhere = flipped.get("as many tokens of another word after it")
    if elsewhere:
        null = {"as many tokens of another word after it": elsewhere}
        rows_.append(row(f"{attribute} flips: {word}", flipped[word], null))
    return rows_, {"pairs": n, "noises": draws, "the whole is the other prompt": [sum(same), len(same)]}


def share_kept(base: judges.Seen, got: judges.Seen, attribute: str) -> float:
    """The share of the other attributes that are as they were."""
    others = [a for a in ATTRIBUTES if a != attribute]
    return sum(getattr(got, a) == getattr(base, a) for a in others) / len(others)


# ---- blocking ----------------------------------------------------------------------------------


def measure_knockout(
    model: Any, attribute: str, n: int, draws: int, options: Options
) -> tuple[list[Row | None], dict[str, Any]]:
    """How often blocking a word takes its attribute away, beside another word of as many tokens blocked."""
    rng = torch.Generator().manual_seed(2)
    gone: Table = {}
    drawn = 0
    names = [
        f"{whose}, {how}" for how in ("everywhere", "for the pixels only") for whose in ("word", "other")
    ]
    filled(gone, n, draws, names)
    without = 0
    for i, (case, _) in enumerate(pairs(attribute, n)):
        ((layout, _),) = layouts_of(model, [Case(case.prompt, case.word)])
        words = matched_words(layout, case.word)
        without += not words
        other = words[int(torch.randint(len(words), (), generator=rng))] if words else None
        for draw in range(draws):
            blocked = [(case.word, True), (other, True), (case.word, False), (other, False)]
            live = [(name, b) for name, b in zip(names, blocked, strict=True) if b[0] is not None]
            edits: list[RowEdit] = []
            for j, (_, (word, text)) in enumerate(live, start=1):
                edits += knockout_edits(model, Case(case.prompt, str(word)), j, text=text)
            rows = [case.prompt] * (1 + len(live))
            images = generate_checked(model, rows, noise(i, draw), edits, options)
            base, *others = [getattr(seen(image), attribute) for image in images]
            if base != case.word:
                continue  # What was never drawn cannot be taken away.
            drawn += 1
            for (name, _), got in zip(live, others, strict=True):
                gone[name][i][draw] = float(got != base)
    rows_ = [
        row(
            f"{attribute} is gone: its word blocked {how}",
            gone[f"word, {how}"],
            {"another word of as many tokens, after it": gone[f"other, {how}"]},
        )
        for how in ("everywhere", "for the pixels only")
    ]
    return rows_, {"pictures with the attribute": drawn, "prompts without a matched word": without}


# ---- edits -------------------------------------------------------------------------------------


def measure_control(
    model: Any, n: int, draws: int, options: Options
) -> tuple[list[Row | None], dict[str, Any]]:
    """Whether an edit does what it says and leaves the rest, beside drawing the other prompt freely."""
    weights = (0.0, 0.5, 2.0, 4.0)
    guidance = {"guidance_scale": options["guidance_scale"]}
    steps = options["num_inference_steps"]
    tables: Table = {}
    names = ["flipped", "kept", "free flipped", "free kept", "refined kept", "free refined kept"]
    filled(tables, n, draws, [*names, *(f"{w} {x}" for w in weights for x in ("background", "in"))])
    for i, (case, scene) in enumerate(pairs("colour", n)):
        short = case.prompt.replace(f"{scene.things[0].size} ", "", 1)
        for draw in range(draws):
            seed = noise(i, draw)
            edits = [WordEdit(case.other, "replace", cross=0.4, own=0.4), WordEdit(case.other, None, own=0.0)]
            edits += [
                WordEdit(case.prompt, None, own=0.0, weights={word: w})
                for word in ("background", "in")
                for w in weights
            ]
            plain = edit_words(model, case.prompt, edits, n_steps=steps, seed=seed, options=guidance)
            more = [WordEdit(case.prompt, "refine", own=0.4), WordEdit(case.prompt, None, own=0.0)]
            longer = edit_words(model, short, more, n_steps=steps, seed=seed, options=guidance)
            base, new, free, *_ = [seen(image) for image in plain]
            was, now, freely = [seen(image) for image in longer]
            apart = (plain[3:] - plain[0]).square().mean((1, 2, 3)).sqrt().view(2, len(weights))
            for name, value in {
                "flipped": float(new.colour == case.other_word),
                "kept": share_kept(base, new, "colour"),
                "free flipped": float(free.colour == case.other_word),
                "free kept": share_kept(base, free, "colour"),
                "refined kept": share_kept(was, now, "size"),
                "free refined kept": share_kept(was, freely, "size"),
            }.items():
                tables[name][i][draw] = value
            for which, word in enumerate(("background", "in")):
                for w, value in zip(weights, apart[which].tolist(), strict=True):
                    tables[f"{w} {word}"][i][draw] = value
    free = "the other prompt drawn freely"
    rows = [
        row("replacing the colour word: it flips", tables["flipped"], {free: tables["free flipped"]}),
        row("replacing the colour word: the rest stays", tables["kept"], {free: tables["free kept"]}),
        row("adding the size: the rest stays", tables["refined kept"], {free: tables["free refined kept"]}),
    ]
    rows += [
        row(
            f"“background” times {w}: root mean square change of the picture",
            tables[f"{w} background"],
            {"“in” times the same": tables[f"{w} in"]},
        )
        for w in weights
    ]
    return rows, {"pairs": n, "noises": draws}


# ---- all ---------------------------------------------------------------------------------------


def jobs(model: Any, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Every table by its name; the first word is what --only takes."""
    options = {"num_inference_steps": args.steps, "guidance_scale": GUIDANCE}
    shared = (args.draws, options)
    out: dict[str, Callable[[], Any]] = {
        "maps": lambda: measure_maps(model, args.n, args.validation, *shared),
        "two": lambda: measure_two(model, args.n, args.validation, *shared),
        "truth": lambda: measure_truth(model, args.causal, *shared),
    }
    for attribute in CHANGED:
        out[f"patch {attribute}"] = lambda a=attribute: measure_patching(model, a, args.pairs, *shared)
    for attribute in CHANGED:
        out[f"knockout {attribute}"] = lambda a=attribute: measure_knockout(model, a, args.pairs, *shared)
    out["control"] = lambda: measure_control(model, args.pairs, *shared)
    return out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="tiny-sd", help="a shipped model, or a folder")
    parser.add_argument("--n", type=int, default=60, help="prompts for the maps")
    parser.add_argument("--validation", type=int, default=40, help="prompts that settings are chosen on")
    parser.add_argument("--causal", type=int, default=16, help="prompts for the pixels that change")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of prompts for each attribute")
    parser.add_argument("--draws", type=int, default=2, help="noises for each prompt")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", default="maps,two,truth,patch,knockout,control")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = mm.load(args.model)
    model.wrapped.set_progress_bar_config(disable=True)
    out: dict[str, Any] = {}
    for name, job in jobs(model, args).items():
        if name.split()[0] not in args.only.split(","):
            continue
        start = time.process_time()
        rows, facts = job()
        out[name] = {"rows": [one.plain() for one in rows if one is not None], **facts}
        print(name, json.dumps(out[name]), f"({time.process_time() - start:.0f} s)")
        print(f"{markdown(name, rows)}\n\n{json.dumps(facts)}\n", flush=True)
    return out


if __name__ == "__main__":
    main(sys.argv[1:])
