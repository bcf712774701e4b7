"""What tiny-llava loses without named neurons, beside others of the same layers that write as much.

python -m tests.quality.neurons [--n 128] [--draws 8] [--only ablation,decoded,domains,modality]

Neurons are named on validation questions and ablated on test questions, of other scenes; controls are drawn
anew `--draws` times: as many neurons of the same layers nearest in norm, and the layers' other neurons moved
in a random direction that writes exactly as much. Log odds are of the right first token, log p - log(1 - p),
which does not saturate. Intervals are 95 %, by bootstrap over questions and draws.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.neurons import (
    NeuronActivity,
    ablate_neurons,
    attribute_neurons,
    neuron_activity,
    probability_change,
    project_neurons,
)
from methods_multimodal.patching import token_roles
from mm_adapters.zoo import measures, questions, world
from tests.quality.asked import Asked, asked, first_tokens, roles
from tests.quality.flow import said

Neuron = tuple[int, int]
WIDTH, LAYERS = 384, 4
KINDS = ("colour", "shape", "where", "how many")


def log_odds(
    model: mm.HookedModel, inputs: Mapping[str, Any], answers: Sequence[str]
) -> Callable[[Any], Tensor]:
    """The log odds of each row's right first token after its last position."""
    right, last = torch.tensor(first_tokens(model, answers)), model.row_positions(inputs)
    rows = torch.arange(len(last))

    def metric(output: Any) -> Tensor:
        logits = output.logits[rows, last].float()
        others = logits.clone()
        others[rows, right] = -torch.inf
        return logits[rows, right] - others.logsumexp(-1)

    return metric


def of_asked(model: mm.HookedModel, some: Asked) -> Callable[[Any], Tensor]:
    return log_odds(model, some.inputs(), [q.answer for q in some.questions])


# ---- knowledge neurons and image neurons ---------------------------------------------------------


def named(model: mm.HookedModel, some: Asked, n: int, role: str) -> dict[str, tuple[Neuron, ...]]:
    """By how they are named: the `n` neurons at a role's positions; "most active" is the baseline."""
    masks = {role: roles(model, some)[role]}
    metric = {"answer": of_asked(model, some)}
    found = {
        "one gradient": attribute_neurons(model, some.inputs(), metric, masks, method="gradient").top(n),
        "integrated gradients": attribute_neurons(model, some.inputs(), metric, masks, steps=12).top(n),
    }
    if role == "last":
        tokens = first_tokens(model, [q.answer for q in some.questions])
        found["probability change"] = probability_change(model, some.inputs(), tokens).top(n)
    domains = {"here": [(some.inputs(), masks[role])], "all": [(some.inputs(), None)]}
    size = neuron_activity(model, domains).size[0].flatten()
    order = size.argsort(descending=True)[:n].tolist()
    found["most active"] = tuple((i // WIDTH, i % WIDTH) for i in order)
    return found


def ablations(
    model: mm.HookedModel, kind: str, n: int, n_questions: int, draws: int, role: str
) -> dict[str, dict[str, Any]]:
    """By how neurons were named: what ablating them at the role's positions moves, beside controls."""
    chosen_on = asked(kind, n_questions, "validation", things="two", seed=4)
    some = asked(kind, n_questions, "test", things="two", seed=4)
    where = roles(model, some)[role]
    table = {}
    for how, neurons in named(model, chosen_on, n, role).items():
        record = ablate_neurons(
            model, some.inputs(), of_asked(model, some), neurons, where=where, n_controls=draws
        )
        table[how] = {
            "effect": record.effect(),
            "matched": record.control_effect(),
            "turned": record.control_effect("turned"),
            "beyond matched": record.above_control(),
            "beyond turned": record.above_control("turned"),
            "norm": record.norm / float(record.control_norm.mean()),
        }
    return table


def decoded(model: mm.HookedModel, kind: str, n: int, n_questions: int, k: int = 5) -> dict[str, Estimate]:
    """How often a neuron's `k` most raised tokens hold one that begins an answer of this kind.

    Of the neurons that image positions, or the last one, give the answer through, and of all neurons of the
    same layers, each as often as layers occur among the named.
    """
    some = asked(kind, n_questions, "validation", things="two", seed=4)
    words = tuple(world.COLOURS) if kind == "colour" else tuple(world.SHAPES)
    answers = torch.tensor(first_tokens(model, words))
    found = {}
    for role in ("image", "last"):
        masks = {role: roles(model, some)[role]}
        record = attribute_neurons(
            model, some.inputs(), {"answer": of_asked(model, some)}, masks, method="gradient"
        )
        neurons = record.top(n)
        found[f"{role} neurons"] = bootstrap(_raise(model, neurons, answers, k)[:, None])
        others = [(layer, i) for layer, _ in neurons for i in range(WIDTH) if (layer, i) not in neurons]
        found[f"all others of the layers of {role} neurons"] = bootstrap(
            _raise(model, list(dict.fromkeys(others)), answers, k)[:, None], n_resamples=500
        )
    return found


def _raise(model: mm.HookedModel, neurons: Sequence[Neuron], answers: Tensor, k: int) -> Tensor:
    tokens = project_neurons(model, neurons, k=k).tokens
    return torch.isin(tokens, answers).any(1).float()


# ---- domains and modalities ----------------------------------------------------------------------


def questions_of(kind: str, n: int, split: str, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Questions of one kind as inputs, and their answers."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    scenes_of = {"colour": "two", "shape": "two", "where": "one", "how many": "many"}
    scenes = [
        world.scene(i, split, 30_000 + seed * 10 + KINDS.index(kind), kind=scenes_of[kind]) for i in range(n)
    ]
    asks = [questions.ask(kind, scene, rng) for scene in scenes]
    inputs = {"text": [q.prompt() for q in asks], "images": measures.images_of(scenes)}
    return inputs, [q.answer for q in asks]


def activity(
    model: mm.HookedModel, n: int, split: str, seed: int, *, by: str = "kind", shuffled: int | None = None
) -> NeuronActivity:
    """Each neuron's activity by kind of question at the last position, or by modality; or by lot."""
    batches: list[tuple[str, dict[str, Any], Tensor]] = []
    for kind in KINDS:
        inputs, _ = questions_of(kind, n, split, seed)
        own = token_roles(model, inputs)
        if by == "kind":
            batches.append((kind, inputs, own["last"]))
        else:
            batches += [("image", inputs, own["image"]), ("text", inputs, own["question"])]
    domains: dict[str, list[Any]] = {}
    rng = None if shuffled is None else np.random.default_rng(shuffled)
    names = sorted({name for name, _, _ in batches})
    for name, inputs, where in batches:
        if rng is None:
            domains.setdefault(name, []).append((inputs, where))
            continue
        # Each row (by modality: each position) is dealt to a domain by lot.
        dealt = torch.from_numpy(
            rng.integers(len(names), size=where.shape if by != "kind" else (len(where), 1))
        )
        for i, other in enumerate(names):
            domains.setdefault(other, []).append((inputs, where & (dealt == i)))
    return neuron_activity(model, domains)


def domain_table(model: mm.HookedModel, n: int, draws: int, share: float) -> dict[str, Any]:
    """Domain-specific neurons of one half, looked at in the other, and what each kind loses without them."""
    first, second = (activity(model, n, "validation", seed) for seed in (0, 1))
    specific = first.specific(share)
    chosen = [neuron for of in specific.values() for neuron in of]
    null = activity(model, n, "validation", 0, shuffled=0)
    dealt = [neuron for of in null.specific(share).values() for neuron in of]
    entropy = second.entropy()
    at = lambda some: torch.tensor([float(entropy[layer, i]) for layer, i in some])[:, None]  # noqa: E731
    names = torch.stack([second.shares()[:, layer, i] for layer, i in chosen]).argmax(1)
    kept = [
        float(second.domains[int(name)] == next(d for d, of in specific.items() if neuron in of))
        for neuron, name in zip(chosen, names, strict=True)
    ]
    out: dict[str, Any] = {
        "how many": {domain: len(of) for domain, of in specific.items()},
        "entropy in the other half, nats": bootstrap(at(chosen)),
        "that of neurons named with kinds dealt out by lot": bootstrap(at(dealt)),
        "entropy of all neurons": float(entropy.mean()),
        "same kind in the other half (chance 0.25)": bootstrap(torch.tensor(kept)[:, None]),
    }
    for domain, neurons in specific.items():
        if not neurons:
            continue
        for kind in KINDS:
            inputs, answers = questions_of(kind, n, "test", 2)
            where = token_roles(model, inputs)["last"]
            record = ablate_neurons(
                model, inputs, log_odds(model, inputs, answers), neurons, where=where, n_controls=draws
            )
            out[f"{len(neurons)} of {domain!r}, asked {kind}"] = (
                record.effect(),
                record.control_effect(),
                record.control_effect("turned"),
            )
    return out


def modality_table(model: mm.HookedModel, n: int, share: float) -> dict[str, Any]:
    """Image- and text-specific neurons of one half of the questions, looked at in the other."""
    first, second = (activity(model, n, "validation", seed, by="modality") for seed in (0, 1))
    specific = first.specific(share)
    chosen = [neuron for of in specific.values() for neuron in of]
    dealt = activity(model, n, "validation", 0, by="modality", shuffled=0)
    by_lot = [neuron for of in dealt.specific(share).values() for neuron in of]
    at = lambda some: torch.tensor([float(second.entropy()[layer, i]) for layer, i in some])[:, None]  # noqa: E731
    return {
        "how many": {domain: len(of) for domain, of in specific.items()},
        "entropy in the other half, nats": bootstrap(at(chosen)),
        "that of neurons named with positions dealt out by lot": bootstrap(at(by_lot)),
        "entropy of all neurons": float(second.entropy().mean()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--named", type=int, default=20)
    parser.add_argument("--only", default="ablation,decoded,domains,modality")
    args = parser.parse_args(argv)
    model, only = mm.load(args.model), args.only.split(",")
    if "ablation" in only:
        for kind, role in (("colour", "last"), ("shape", "last"), ("colour", "image"), ("shape", "image")):
            print(f"\n### {args.named} neurons of the answer at {role} positions: {kind}, log odds moved\n")
            print(
                "| named by | ablated | matched neurons | as much, turned | beyond matched | beyond "
                "turned | norm |"
            )
            print("|---|---|---|---|---|---|---|")
            for how, row in ablations(model, kind, args.named, args.n, args.draws, role).items():
                cells = [said(cell, 1, 2) for cell in row.values() if isinstance(cell, Estimate)]
                print(f"| {how} | " + " | ".join(cells) + f" | {row['norm']:.2f} |", flush=True)
    if "decoded" in only:
        for kind in ("colour", "shape"):
            print(f"\n### Decoded: a word of the kind among the 5 tokens raised most ({kind}), percent\n")
            print("| neurons | share |\n|---|---|")
            for what, value in decoded(model, kind, args.named, args.n).items():
                print(f"| {what} | {said(value)} |", flush=True)
    for name, table in (("domains", domain_table), ("modality", modality_table)):
        if name in only:
            found = (
                table(model, args.n, args.draws, 0.02) if name == "domains" else table(model, args.n, 0.05)
            )
            print(f"\n### Specific neurons: {name}\n\n| what | value | matched neurons | as much, turned |")
            print("|---|---|---|---|")
            for what, value in found.items():
                cells = [*value, *[None] * 3][:3] if isinstance(value, tuple) else [value, "", ""]
                print(
                    f"| {what} | "
                    + " | ".join(said(c, 1, 2) if isinstance(c, Estimate) else str(c) for c in cells)
                    + " |"
                )


if __name__ == "__main__":
    main()
    sys.exit(0)
