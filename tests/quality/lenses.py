"""What lenses say on the zoo, where the truth is known, beside chance.

python -m tests.quality.lenses [--only NAME ...] [--n 192] [--quick]

Settings (learning rates, layers, spreads, thresholds, detectors) are chosen on validation scenes and judged
on test scenes. Intervals are 95 % by bootstrap over scenes. Nulls, by the same functions: patches or labels
in a random order, another prompt's truth, the best constant, an untrained twin (same config, weights drawn
anew).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal import lenses
from methods_multimodal.core.embed import embed_texts
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.lenses.anomaly import DETECTORS
from mm_adapters.zoo import measures, world
from tests.quality import lens_data as data
from tests.quality.dissection import untrained
from tests.quality.lens_pictures import diffusion
from tests.quality.lens_places import contextual, latent

__all__ = ["TABLES", "contextual", "diffusion", "latent", "main"]


@dataclass(frozen=True)
class Line:
    """A row of a table: what it is of, its value, and each null."""

    what: str
    value: str
    nulls: str


def said(of: Estimate, digits: int = 3) -> str:
    """A mean and its interval."""
    return f"{of.mean:.{digits}f} ({of.low:.{digits}f} to {of.high:.{digits}f})"


def share(values: Tensor) -> Estimate:
    """The share of rows for which it holds."""
    return bootstrap(values.float().reshape(-1, 1), n_resamples=2000)


def own_logits(n: int) -> list[Line]:
    """The last layer beside the model's own logits, at every position, under both engines."""
    lines = []
    for engine in ("hooked", "nnsight"):
        model: Any = mm.load("tiny-llava", engine=engine)
        batch = data.asked(model, min(n, 32), "test").batches[0]
        whole = lenses.logit_lens(model, batch, final_norm=True, position="all")
        with torch.no_grad():
            own = model.wrapped(**batch).logits[list(whole.rows), list(whole.positions)].float()
        differ = int((own != whole.scores[:, -1]).sum())
        raw = lenses.logit_lens(model, batch, final_norm=False, position="all").scores[:, -1]
        apart = float((raw - own).abs().max())
        what = f"{engine}: logits of the last layer that are not the model's own, of {own.numel():,}"
        lines.append(Line(what, str(differ), f"without the final norm: up to {apart:.1f} apart"))
    return lines


def tuned(n: int) -> list[Line]:
    """The tuned lens' divergence on test questions, at text positions and where the answer begins."""
    model = mm.load("tiny-llava")
    sets = [
        data.asked(model, m, s).batches for m, s in ((8 * n, "train"), (n, "validation"), (2 * n, "test"))
    ]
    lines = []
    for position, name in (("text", "all text positions"), (-1, "where the answer begins")):
        lens = lenses.train_tuned_lens(model, *sets, position=position, n_steps=max(8, 2 * n))
        constant = bootstrap(lens.constant_kl[:, None])
        for layer in range(lens.kl.shape[1]):
            logit = bootstrap(lens.logit_kl[:, [layer]])
            at = "embedding" if layer == 0 else f"layer {layer - 1}"
            null = f"logit lens {said(logit)}; mean answer {said(constant)}; gain {said(lens.gain(layer))}"
            lines.append(Line(f"{name}, {at}: nats", said(lens.held_out(layer)), null))
    return lines


def attention(n: int) -> list[Line]:
    """The attention lens' divergence where the answer begins, and what each head gains on the mean answer."""
    model = mm.load("tiny-llava")
    sets = [
        data.asked(model, m, s).batches for m, s in ((8 * n, "train"), (n, "validation"), (2 * n, "test"))
    ]
    lines = []
    for layer in range(model.towers["language"].n_layers()):
        lens = lenses.train_attention_lens(model, layer, *sets, n_steps=max(8, n))
        each = "; ".join(f"head {h} gains {said(lens.gain(h))}" for h in range(lens.kl.shape[1]))
        constant = f"mean answer {said(bootstrap(lens.constant_kl[:, None]))}"
        direct = f"heads read untrained {float(lens.direct_kl.mean()):.3f}"
        nulls = f"{constant}; {direct}; {each}"
        lines.append(Line(f"layer {layer}, mean of its heads: nats", said(bootstrap(lens.kl)), nulls))
    return lines


def exits(n: int) -> list[Line]:
    """Accuracy of the answer's first token by layer, and when the model stops as soon as it is sure."""
    model = mm.load("tiny-llava")
    found = {}
    for split in ("validation", "test"):
        given = data.asked(model, 2 * n, split)
        parts = [lenses.logit_lens(model, b, final_norm=True) for b in given.batches]
        each = [lenses.early_exit(p, a) for p, a in zip(parts, given.answers.split(data.SIZE), strict=True)]
        right = torch.cat([e.right for e in each])
        found[split] = lenses.EarlyExit(right, torch.cat([e.confidence for e in each]), each[0].layers)
        guess = lenses.best_constant(given.answers)
    test, threshold = found["test"], found["validation"].choose_threshold()
    lines = [
        Line(f"accuracy at {name}", said(test.accuracy(i)), f"commonest answer {guess:.3f}")
        for i, name in enumerate(test.layers)
    ]
    blocks = f"{test.mean_layers(threshold):.2f} of {len(test.layers) - 1} blocks"
    null = f"as many exits, of other rows: {said(test.accuracy_at_shuffled(threshold))}"
    what = f"stopping at {threshold:.2f} sure ({blocks})"
    return [*lines, Line(what, said(test.accuracy_at(threshold)), null)]


def clip(n: int) -> list[Line]:
    """Zero-shot accuracy of the class position's state by layer, in the joint space."""
    model, twin = mm.load("tiny-clip"), untrained("tiny-clip", "tiny-clip", 0)
    scenes = [world.scene(i, "test", kind="one") for i in range(2 * n)]
    pixels = model.prepare(images=measures.images_of(scenes))
    lines = []
    for attribute in measures.ATTRIBUTES:
        names = measures.values(attribute)
        truth = torch.tensor([names.index(measures.value_of(s, attribute)) for s in scenes])
        right = {}
        for kind, one in (("trained", model), ("untrained", twin)):
            reading = lenses.clip_lens(one, pixels, embed_texts(one, measures.prompts(attribute)))
            right[kind] = reading.scores.argmax(-1) == truth[:, None]
        shuffled = truth[torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))]
        chance = f"chance {1 / len(names):.3f}, commonest {lenses.best_constant(truth):.3f}"
        for i, name in enumerate(reading.layers):
            mixed = share(reading_right(model, pixels, attribute, shuffled)[:, i])
            null = (
                f"{chance}; shuffled labels {said(mixed)}; untrained {said(share(right['untrained'][:, i]))}"
            )
            lines.append(Line(f"{attribute}, {name}", said(share(right["trained"][:, i])), null))
    return lines


def reading_right(model: Any, pixels: Any, attribute: str, truth: Tensor) -> Tensor:
    """Whether each layer's nearest text is the true one, [image, layer]."""
    reading = lenses.clip_lens(model, pixels, embed_texts(model, measures.prompts(attribute)))
    return reading.scores.argmax(-1) == truth[:, None]


def anomalies(n: int) -> list[Line]:
    """AUROC of trajectories of unusual inputs among usual ones, the detector chosen on validation inputs."""
    model = mm.load("tiny-llava")
    normal = read(model, data.asked(model, 4 * n, "train").batches)
    usual = {s: read(model, data.asked(model, n, s, 5).batches) for s in ("validation", "test")}
    again = read(model, data.asked(model, n, "test", 6).batches)
    unusual: dict[str, Callable[[str], list[dict[str, Any]]]] = {
        "another's image": lambda s: data.asked(model, n, s, 5, swapped=True).batches,
        "an image of noise": lambda s: noisy(data.asked(model, n, s, 5).batches),
        "a shape and colour never seen together": lambda s: (
            data.asked(model, n, "novel", 5 + (s == "test")).batches
        ),
    }
    lines = []
    for name, make in unusual.items():
        strange = {s: read(model, make(s)) for s in ("validation", "test")}
        chosen_on = (usual["validation"], strange["validation"])
        aurocs = {d: told(normal, *chosen_on, d).auroc for d in DETECTORS}
        best = max(aurocs, key=lambda d: aurocs[d])
        value = told(normal, usual["test"], strange["test"], best)
        null = told(normal, usual["test"], again, best)
        sure = [-x.probabilities[:, -1].amax(-1) for x in (usual["test"], strange["test"])]
        plain = lenses.separation(torch.cat(sure), value.positive, torch.zeros(0))
        beside = f"other usual questions {interval(null)}; last layer's confidence alone {interval(plain)}"
        lines.append(Line(f"{name} ({best}): AUROC", interval(value), beside))
    return lines


def told(normal: Any, usual: Any, strange: Any, detector: Any) -> lenses.Separation:
    """How well a detector tells strange inputs from usual ones."""
    scores = [lenses.anomaly_scores(normal, x, detector=detector).scores for x in (usual, strange)]
    positive = torch.arange(sum(map(len, scores))) >= len(scores[0])
    return lenses.separation(torch.cat(scores), positive, torch.zeros(0))


def interval(of: lenses.Separation) -> str:
    """An AUROC and its interval."""
    return f"{of.auroc:.3f} ({of.low:.3f} to {of.high:.3f})"


def read(model: Any, batches: Sequence[dict[str, Any]]) -> lenses.LensReading:
    """The logit lens where answers begin, over all batches."""
    return lenses.joined([lenses.logit_lens(model, b, final_norm=True) for b in batches])


def noisy(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same questions about noise."""
    rng = torch.Generator().manual_seed(0)
    return [{**b, "pixel_values": torch.randn(b["pixel_values"].shape, generator=rng)} for b in batches]


def first(n: int) -> list[Line]:
    """AUROC of "it is not there", from the first token's logits; half of the questions have no answer."""
    model, twin = mm.load("tiny-llava"), untrained("tiny-llava", "tiny-llava", 0)
    lines = []
    for name, one in (("tiny-llava", model), ("untrained twin", twin)):
        sets: list[Tensor] = []
        for split in ("train", "validation", "test"):
            texts, pictures, absent = unanswerable(4 * n if split == "train" else n, split)
            sets += [lenses.first_token_logits(one, data.prepared(one, texts, pictures)), absent]
        found = lenses.separate(*sets)
        sure = lenses.separation(-sets[4].softmax(-1).amax(-1), sets[5], torch.zeros(0))
        mixed = f"shuffled labels {float(found.null.mean()):.3f} (up to {float(found.null.max()):.3f})"
        lines.append(
            Line(f"{name}: AUROC", interval(found), f"{mixed}; its confidence alone {interval(sure)}")
        )
    return lines


def unanswerable(n: int, split: str) -> tuple[list[str], list[Any], Tensor]:
    """Questions about the colour of a shape, each once with a picture that has it and once without."""
    scenes = [world.scene(i, split, 11, kind="one") for i in range(n)]
    pictures = measures.images_of(scenes)
    texts, shown, absent = [], [], []
    for i, scene in enumerate(scenes):
        other = next(j for j in range(i + 1, i + n) if scenes[j % n].things[0].shape != scene.things[0].shape)
        text = f"<image>\nquestion: what colour is the {scene.things[0].shape}? answer:"
        texts += [text, text]
        shown += [pictures[i], pictures[other % n]]
        absent += [False, True]
    return texts, shown, torch.tensor(absent)


def contextual_lines(n: int) -> list[Line]:
    """The grounding box of a word of the question."""
    return [Line(*one) for one in contextual(n)]


def latent_lines(n: int) -> list[Line]:
    """Image tokens on an object, named by the object's own colour or shape."""
    return [Line(*one) for one in latent(n)]


def diffusion_lines(n: int) -> list[Line]:
    """What each layer of tiny-sd's text tower draws, judged by rules on pixels."""
    return [Line(*one) for one in diffusion(n)]


TABLES: dict[str, Callable[[int], list[Line]]] = {
    "logits": own_logits,
    "tuned": tuned,
    "attention": attention,
    "exits": exits,
    "clip": clip,
    "anomalies": anomalies,
    "first": first,
    "contextual": contextual_lines,
    "latent": latent_lines,
    "diffusion": diffusion_lines,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(TABLES), default=list(TABLES))
    parser.add_argument("--n", type=int, default=192, help="scenes; some tables take a multiple")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    for name in args.only:
        lines = TABLES[name](16 if args.quick else args.n)
        print(f"\n### {name}: {TABLES[name].__doc__}\n\n| what | value | beside |\n|---|---|---|")
        for line in lines:
            print(f"| {line.what} | {line.value} | {line.nulls} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
