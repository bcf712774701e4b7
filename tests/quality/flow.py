"""Where tiny-llava's answer comes from: tracing, attention knockout and heads, each beside its control.

python -m tests.quality.flow [--n 256] [--traced 96] [--draws 3] [--only laws,knockout,flow,trace,heads]

Questions are about the colour or shape of one object, on scenes of a split and seeds that nothing was
trained or chosen on. Accuracy is of the likeliest first token, which tells all colours and shapes apart. A
twin is the scene with another answer. Intervals are 95 %, by bootstrap over questions; a control is drawn
anew `--draws` times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.patching import (
    Corruption,
    Cut,
    averaged,
    head_importance,
    information_flow,
    knock_out,
    noised,
    other_pictures,
    other_words,
    position_importance,
    resampled,
    trace,
)
from tests.quality.asked import Asked, asked, correct, first_tokens, gap, roles
from tests.quality.dissection import untrained

_BATCH = 64


def parts(some: Asked) -> list[Asked]:
    return [some.part(i, _BATCH) for i in range(0, len(some), _BATCH)]


# ---- laws ----------------------------------------------------------------------------------------


def laws(model: mm.HookedModel, n: int) -> dict[str, float]:
    """The largest |difference| from what each law says, over questions, layers and both directions."""
    some = asked("colour", n, "test", seed=1)
    clean, metric = some.inputs(), gap(model, some)
    pair = other_pictures(model, clean, some.inputs(twin=True))
    everything = {"all": torch.ones_like(roles(model, some)["image"])}
    of_vision = {"all": torch.ones_like(roles(model, some, "vision")["image"])}
    found: dict[str, float] = {}
    for into in ("corrupted", "clean"):
        null = trace(model, clean, Corruption(clean), metric, everything, into=into)
        full = trace(model, clean, pair, metric, everything, into=into)
        dead = trace(model, clean, pair, metric, of_vision, tower="vision", part="hook_mlp_out", into=into)
        target = full.clean if into == "corrupted" else full.corrupted
        rows = {
            "null patch (clean into clean)": null.effect,
            "all nodes patched, less the other run": full.patched - target[:, None, None],
            "vision block behind the feature layer": dead.effect[:, 3],
            "(the block before it, for scale)": dead.effect[:, 2],
        }
        for name, value in rows.items():
            found[name] = max(found.get(name, 0.0), float(value.abs().max()))
    return found


# ---- knockout ------------------------------------------------------------------------------------


def knockout(model: mm.HookedModel, some: Asked, draws: int) -> dict[str, dict[str, Estimate]]:
    """By what is blocked from the text: the accuracy, that of as many other patches, and the drops."""
    values: dict[str, list[Tensor]] = {}
    for part in parts(some):
        own = roles(model, part)
        around = own["object"] | own["buffer"]
        sets = {"object": own["object"], "object and buffer": around, "image": own["image"]}
        cuts = [Cut(name, own["text"], keys) for name, keys in sets.items()]
        cuts.append(Cut("object, from the question", own["question"], own["object"]))
        cuts.append(Cut("object, from the last", own["last"], own["object"]))
        for draw in range(draws):
            control = own.matched("object", "background", seed=draw)
            cuts.append(Cut(f"object control {draw}", own["text"], control))
            cuts.append(Cut(f"question control {draw}", own["question"], control))
            cuts.append(Cut(f"last control {draw}", own["last"], control))
        record = knock_out(model, part.inputs(), correct(model, part), cuts)
        values.setdefault("base", []).append(record.base)
        for name, value in zip(record.names, record.values, strict=True):
            values.setdefault(name, []).append(value)
    joined = {name: torch.cat(of) for name, of in values.items()}
    base = joined["base"][:, None]
    controls = {
        "object": "object control",
        "object, from the question": "question control",
        "object, from the last": "last control",
    }
    table: dict[str, dict[str, Estimate]] = {"nothing": {"accuracy": bootstrap(base)}}
    for name in (
        "object",
        "object, from the question",
        "object, from the last",
        "object and buffer",
        "image",
    ):
        value = joined[name][:, None]
        table[name] = {"accuracy": bootstrap(value), "drop": bootstrap(base, than=value)}
        if name in controls:
            other = torch.stack([joined[f"{controls[name]} {draw}"] for draw in range(draws)], 1)
            table[name]["control"] = bootstrap(other)
            table[name]["control's drop"] = bootstrap(base, than=other, paired_draws=False)
    return table


def flow(model: mm.HookedModel, some: Asked) -> tuple[Any, list[list[Estimate]], Estimate]:
    """The accuracy by flow and layer."""
    records = [
        information_flow(model, p.inputs(), correct(model, p), roles=roles(model, p)) for p in parts(some)
    ]
    values = torch.cat([r.values for r in records], 2)
    base = bootstrap(torch.cat([r.base for r in records])[:, None])
    return records[0].flows, [[bootstrap(v[:, None]) for v in row] for row in values], base


# ---- tracing -------------------------------------------------------------------------------------


def corruptions(model: mm.HookedModel, some: Asked) -> dict[str, Callable[[], Corruption]]:
    """Each way to corrupt these questions; of words the question's own, of states the image's."""
    clean, image, site = some.inputs(), roles(model, some)["image"], "language.hook_embed"
    return {
        "twin picture": lambda: other_pictures(model, clean, some.inputs(twin=True)),
        "noise, 3 deviations": lambda: noised(model, clean, image, site=site),
        "mean image token": lambda: averaged(model, clean, image, site=site),
        "another row's image": lambda: resampled(model, clean, image, site=site),
    }


def traced(
    model: mm.HookedModel, some: Asked, how: str, part: str = "hook_resid_pre", seed: int = 0
) -> tuple[Any, tuple[str, ...]]:
    """The share of the effect by layer and role; "control" is as many background patches."""
    own = roles(model, some)
    names = ("object", "buffer", "background", "question", "last")
    masks = {name: own[name] for name in names} | {"control": own.matched("object", "background", seed=seed)}
    record = trace(model, some.inputs(), corruptions(model, some)[how](), gap(model, some), masks, part=part)
    return record, tuple(masks)


def words_traced(model: mm.HookedModel, n: int) -> Any:
    """Symmetric replacement of the word that says which object of two is meant: restoring its own states."""
    scenes = asked("colour", n * 4, "test", things="two", seed=3)
    kept, swapped, wrong = [], [], []
    for i, (scene, question) in enumerate(zip(scenes.scenes, scenes.questions, strict=True)):
        meant = next(k for k, t in enumerate(scene.things) if t.colour == question.answer)
        own, other = scene.things[meant], scene.things[1 - meant]
        text = question.text.replace(own.shape, other.shape)
        lengths = {len(first_tokens_all(model, t.shape)) for t in scene.things}
        if (
            own.shape != other.shape
            and text != question.text
            and own.colour != other.colour
            and len(lengths) == 1
        ):
            kept.append(i)
            swapped.append(f"<image>\nquestion: {text} answer:")
            wrong.append(other.colour)
    kept, swapped, wrong = kept[:n], swapped[:n], wrong[:n]
    some = Asked(
        tuple(scenes.scenes[i] for i in kept),
        tuple(scenes.twins[i] for i in kept),
        tuple(scenes.questions[i] for i in kept),
        tuple(wrong),
        scenes.objects[kept],
    )
    own = roles(model, some)
    pair = other_words(model, some.inputs(), some.inputs() | {"text": swapped})
    assert pair.positions is not None
    masks = {"the word": pair.positions, "rest of the question": own["question"] & ~pair.positions}
    masks |= {"last": own["last"], "object": own["object"]}
    return trace(model, some.inputs(), pair, gap(model, some), masks), tuple(masks)


def first_tokens_all(model: mm.HookedModel, word: str) -> list[int]:
    """All tokens of a word."""
    return model.tokenizer_of("language")(f" {word}", add_special_tokens=False).input_ids


# ---- heads ---------------------------------------------------------------------------------------


def heads(model: mm.HookedModel, some: Asked, chosen_on: Asked, n_heads: int, draws: int) -> dict[str, Any]:
    """Heads named by log probability increase on other questions: what silencing them at the last does.

    The control silences as many heads drawn among the others, of any layer.
    """
    tokens = first_tokens(model, [q.answer for q in chosen_on.questions])
    importance = head_importance(model, chosen_on.inputs(), tokens)
    named = importance.top(n_heads)
    n_layers, per_layer = importance.increase.shape[1:]
    others = [(i, h) for i in range(n_layers) for h in range(per_layer) if (i, h) not in named]
    rng = torch.Generator().manual_seed(0)
    sets = [list(named)]
    for _ in range(draws):
        sets.append([others[i] for i in torch.randperm(len(others), generator=rng)[:n_heads].tolist()])
    own = roles(model, some)
    base = gap(model, some)(model.run(some.inputs()).output).detach()
    moved = []
    for chosen in sets:
        edits = [
            mm.Edit(
                f"language.blocks.{layer}.attn.hook_z",
                _silent([h for at, h in chosen if at == layer], own["last"]),
            )
            for layer in sorted({layer for layer, _ in chosen})
        ]
        moved.append(gap(model, some)(model.run(some.inputs(), edit=edits).output).detach() - base)
    answers = first_tokens(model, [q.answer for q in some.questions])
    of_chosen = position_importance(model, chosen_on.inputs(), tokens, list(named)).increase
    by_image = (of_chosen * roles(model, chosen_on)["image"][:, None]).sum(2).mean(0)
    reader = named[int(by_image.argmax())]
    read = position_importance(model, some.inputs(), answers, [reader]).increase[:, 0]
    image = read.masked_fill(~own["image"], -torch.inf)
    on_object = own["object"][torch.arange(len(some)), image.argmax(1)].float()
    area = own["object"].sum(1) / own["image"].sum(1)
    return {
        "named": named,
        "silencing them moves the gap by": bootstrap(moved[0][:, None]),
        "silencing others": bootstrap(torch.stack(moved[1:], 1)),
        f"the patch from which {reader} raises the answer most is the object's": bootstrap(
            on_object[:, None]
        ),
        "chance, the object's share of patches": bootstrap(area[:, None]),
    }


def _silent(chosen: Sequence[int], where: Tensor) -> Callable[[Tensor], Tensor]:
    def put(z: Tensor) -> Tensor:
        z = z.clone()
        for head in chosen:
            z[:, :, head] = z[:, :, head].masked_fill(where[:, :, None], 0.0)
        return z

    return put


# ---- the table -----------------------------------------------------------------------------------


def said(of: Estimate | None, scale: float = 100, digits: int = 1) -> str:
    """A mean with its interval."""
    if of is None:
        return "–"
    mean, low, high = (f"{scale * x:z.{digits}f}" for x in (of.mean, of.low, of.high))
    return f"{mean} [{low}, {high}]"


def print_knockout(model: mm.HookedModel, n: int, draws: int) -> None:
    for things in ("one", "two"):
        for kind in ("colour", "shape"):
            some = asked(kind, n, "test", things=things, seed=1)
            print(
                f"\n### Blocked: {kind} of one object, scenes of {things} ({len(some)} questions), percent\n"
            )
            print(
                "| blocked from the text | accuracy | drop | as many others | their drop "
                "|\n|---|---|---|---|---|"
            )
            for name, cells in knockout(model, some, draws).items():
                row = [said(cells.get(c)) for c in ("accuracy", "drop", "control", "control's drop")]
                print(f"| {name} | " + " | ".join(row) + " |", flush=True)


def print_flow(model: mm.HookedModel, n: int) -> None:
    for kind in ("colour", "shape"):
        some = asked(kind, n, "test", things="two", seed=1)
        flows, values, base = flow(model, some)
        print(
            f"\n### Flow: accuracy with it blocked in one layer ({kind}, two objects; {said(base)} with "
            "none)\n"
        )
        print("| flow | " + " | ".join(f"layer {i}" for i in range(len(values[0]))) + " |")
        print("|---" * (len(values[0]) + 1) + "|")
        for (source, target), row in zip(flows, values, strict=True):
            print(f"| {source} to {target} | " + " | ".join(map(said, row)) + " |", flush=True)


def print_trace(title: str, record: Any, names: Sequence[str]) -> None:
    share = record.share()
    print(f"\n### Restored: {title} (gap {float(record.clean.mean()):.1f} clean, ", end="")
    print(f"{float(record.corrupted.mean()):.1f} corrupted)\n")
    print("| layer | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for i, layers in enumerate(record.windows):
        cells = [
            f"{float(share.mean[i, j]):z.2f} [{float(share.low[i, j]):z.2f}, {float(share.high[i, j]):z.2f}]"
            for j in range(len(names))
        ]
        print(f"| {layers[0]} | " + " | ".join(cells) + " |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--traced", type=int, default=96)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--only", default="laws,knockout,flow,trace,heads")
    args = parser.parse_args(argv)
    model, only = mm.load(args.model), args.only.split(",")
    if "laws" in only:
        print("### Laws\n\n| law | largest difference |\n|---|---|")
        for name, value in laws(model, min(args.traced, 32)).items():
            print(f"| {name} | {value} |", flush=True)
    if "knockout" in only:
        print_knockout(model, args.n, args.draws)
    if "flow" in only:
        print_flow(model, args.n)
    if "trace" in only:
        for kind in ("colour", "shape"):
            some = asked(kind, args.traced, "test", things="two", seed=2)
            for how in corruptions(model, some) if kind == "colour" else ("twin picture",):
                print_trace(f"{kind}, {how}", *traced(model, some, how))
        some = asked("colour", args.traced, "test", things="two", seed=2)
        print_trace(
            "the same of attention outputs, twin picture",
            *traced(model, some, "twin picture", "hook_attn_out"),
        )
        print_trace(
            "the same of MLP outputs, twin picture", *traced(model, some, "twin picture", "hook_mlp_out")
        )
        print_trace("word of the question replaced", *words_traced(model, args.traced))
        twin = untrained(args.model, "tiny-llava", 0)
        print_trace("untrained twin, twin picture", *traced(twin, some, "twin picture"))
    if "heads" in only:
        for kind in ("colour", "shape"):
            some = asked(kind, args.traced, "test", things="two", seed=2)
            chosen = asked(kind, args.traced, "validation", things="two", seed=2)
            print(f"\n### Heads: {kind}\n\n| what | value |\n|---|---|")
            for name, value in heads(model, some, chosen, 3, 5 * args.draws).items():
                scale = 1 if "silencing" in name else 100
                print(
                    f"| {name} | {said(value, scale) if isinstance(value, Estimate) else value} |", flush=True
                )


if __name__ == "__main__":
    main()
    sys.exit(0)
