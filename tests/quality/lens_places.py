"""Lenses at image tokens of tiny-llava: where a word is grounded, and what an object's patches are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal import lenses
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.lenses import box_iou
from mm_adapters.zoo import measures, questions, world
from tests.quality import lens_data as data
from tests.quality.dissection import untrained

SPREADS = (0.0, 0.5, 1.0, 1.5, 2.0)
Box = tuple[int, int, int, int]
Row = tuple[str, str, str]


def contextual(n: int) -> list[Row]:
    """Where an object is, by the colour that answers a question about it; and which of two is meant."""
    model, twin = mm.load("tiny-llava"), untrained("tiny-llava", "tiny-llava", 0)
    scenes = {s: [world.scene(i, s, 21, kind="one") for i in range(n)] for s in ("validation", "test")}
    boxes = {s: [data.patch_box(world.masks(x)[0]) for x in of] for s, of in scenes.items()}
    constant = best_box(boxes["validation"])
    prior = [box_iou(constant, box) for box in boxes["test"]]
    rows = []
    for name, one, maps_of in (
        ("contextual lens", model, partial(_contextual_maps, word=None)),
        ("logit lens of the answer", model, _logit_maps),
        ("contextual lens of “answer”, which tells nothing", model, partial(_contextual_maps, word="answer")),
        ("contextual lens of an untrained twin", twin, partial(_contextual_maps, word=None)),
    ):  # fmt: skip
        maps = {s: maps_of(one, of) for s, of in scenes.items()}
        number, spread = _chosen(maps["validation"], boxes["validation"])
        picked = maps["test"][:, number]
        rng = torch.Generator().manual_seed(0)
        mixed = torch.stack([m.flatten()[torch.randperm(64, generator=rng)].reshape(8, 8) for m in picked])
        value, null = (_ious(m, boxes["test"], spread) for m in (picked, mixed))
        nulls = f"patches shuffled {_said(null)}; one box for all {_said(prior)}"
        rows.append((f"one object, {name} ({_layers(number, maps)}): IoU", _said(value), nulls))
    two = {s: data.two_shapes(n, s, 21) for s in ("validation", "test")}
    for name, one in (("contextual lens", model), ("contextual lens of an untrained twin", twin)):
        right = {s: _asked_above_other(_contextual_maps(one, of, word=None), of) for s, of in two.items()}
        number = int(right["validation"].mean(0).argmax())
        what = (
            f"two objects, {name} ({_layers(number, {'test': right['test']})}): the asked one above the other"
        )
        rows.append((what, _estimate(right["test"][:, number]), "chance 0.5"))
    return rows


def _layers(number: int, maps: Mapping[str, Tensor]) -> str:
    n = maps["test"].shape[1]
    if n == 5:
        return f"layer {number - 1}"
    return f"image tokens at layer {number // 5 - 1}, words at {number % 5 - 1}"


def _asked_above_other(maps: Tensor, scenes: Sequence[world.Scene]) -> Tensor:
    """Whether the asked object's patches have a larger mean than the other's, [scene, map]."""
    shares = torch.stack([torch.stack([data.covered(m) for m in world.masks(s)]) for s in scenes])
    means = torch.einsum("smhw,sohw->smo", maps, shares) / shares.sum((-1, -2))[:, None]
    rows, asked = torch.arange(len(scenes)), torch.arange(len(scenes)) % 2
    return (means[rows, :, asked] > means[rows, :, 1 - asked]).float()


def _question(scene: world.Scene, number: int) -> tuple[str, str]:
    """A question about an object's colour, and its answer."""
    thing = scene.things[number % len(scene.things)]
    return f"<image>\nquestion: what colour is the {thing.shape}? answer:", thing.colour


def _contextual_maps(model: Any, scenes: Sequence[world.Scene], word: str | None) -> Tensor:
    """[scene, pair of layers, down, across], of the answer or of a word."""
    asked = [_question(scene, i) for i, scene in enumerate(scenes)]
    maps = []
    batches = data.prepared(model, [f"{q} {a}" for q, a in asked], measures.images_of(scenes))
    for i, batch in enumerate(batches):
        words = [word or answer for _, answer in asked[i * data.SIZE : (i + 1) * data.SIZE]]
        reading = lenses.contextual_lens(model, batch, words)
        maps += [reading.of_row(row).scores.flatten(1).T.reshape(-1, 8, 8) for row in range(len(words))]
    return torch.stack(maps)


def _logit_maps(model: Any, scenes: Sequence[world.Scene]) -> Tensor:
    """[scene, layer, down, across]: the log-probability of the answer's first token."""
    asked = [_question(scene, i) for i, scene in enumerate(scenes)]
    names = list(world.COLOURS)
    tokens = data.first_tokens(model, names).tolist()
    maps = []
    batches = data.prepared(model, [q for q, _ in asked], measures.images_of(scenes))
    for i, batch in enumerate(batches):
        reading = lenses.logit_lens(model, batch, final_norm=True, position="image", tokens=tokens)
        for row, (_, answer) in enumerate(asked[i * data.SIZE : (i + 1) * data.SIZE]):
            own = reading.of_row(row)
            assert own.total is not None
            logs = own.scores - own.total[..., None]
            maps.append(logs[..., names.index(answer)].T.reshape(-1, 8, 8))
    return torch.stack(maps)


def _chosen(maps: Tensor, boxes: Sequence[Box]) -> tuple[int, float]:
    """The map (of a layer, or a pair) and the spread with the largest mean IoU."""
    pairs = [(i, spread) for i in range(maps.shape[1]) for spread in SPREADS]
    return max(pairs, key=lambda p: sum(_ious(maps[:, p[0]], boxes, p[1])))


def _ious(maps: Tensor, boxes: Sequence[Box], spread: float) -> list[float]:
    found = [lenses.grounding_box(one, spread) for one in maps]
    return [box_iou(a, b) for a, b in zip(found, boxes, strict=True)]


def best_box(boxes: Sequence[Box]) -> Box:
    """The one box that is nearest to all: the null of a lens that never looks."""
    ends = [(a, b) for a in range(8) for b in range(a + 1, 9)]
    every = [(top, left, bottom, right) for top, bottom in ends for left, right in ends]
    return max(every, key=lambda one: sum(box_iou(one, box) for box in boxes))


def latent(n: int) -> list[Row]:
    """The share of image tokens on an object whose nearest colour (or shape) is the object's own."""
    model, twin = mm.load("tiny-llava"), untrained("tiny-llava", "tiny-llava", 0)
    scenes = {s: [world.scene(i, s, 31, kind="one") for i in range(n)] for s in ("validation", "test")}
    ways: dict[str, list[tuple[Any, bool]]] = {"logit lens": [(None, False)]}
    for name, one in (("LatentLens", model), ("LatentLens of an untrained twin", twin)):
        ways[name] = [
            (_index(one, n, images), centred) for images in (True, False) for centred in (False, True)
        ]
    rows = []
    for attribute, names in (("colour", tuple(world.COLOURS)), ("shape", world.SHAPES)):
        for name, tried in ways.items():
            one = twin if "twin" in name else model
            each = [
                {s: _shares(one, of, attribute, names, *way) for s, of in scenes.items()} for way in tried
            ]
            best = max(range(len(each)), key=lambda i: float(each[i]["validation"][0].mean(0).max()))
            layer = int(each[best]["validation"][0].mean(0).argmax())
            value, null = (_estimate(x[:, layer]) for x in each[best]["test"])
            at = "embedding" if layer == 0 else f"layer {layer - 1}"
            if name != "logit lens":
                at += ", words read " + ("with images" if best < 2 else "alone")
                at += ", centred" if tried[best][1] else ""
            nulls = f"labels shuffled {null}; chance {1 / len(names):.3f}"
            rows.append(
                (f"{attribute} by the {name} ({at}): share of an object's image tokens", value, nulls)
            )
    return rows


def _shares(
    model: Any,
    scenes: Sequence[world.Scene],
    attribute: str,
    names: Sequence[str],
    index: lenses.ContextualIndex | None,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """[scene, layer]: the share of an object's patches named right; the same by labels in another order."""
    said, truth, scene = _said_of_patches(model, scenes, attribute, names, index, centred)
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(0))
    values = torch.tensor([names.index(getattr(s.things[0], attribute)) for s in scenes])[order]
    return _by_scene(said == truth[:, None], scene), _by_scene(said == values[scene][:, None], scene)


def _index(model: Any, n: int, images: bool) -> lenses.ContextualIndex:
    """Words of training questions and their answers, read with their images or alone."""
    pairs = [questions.question(i, "train", 3) for i in range(2 * n)]
    if not images:
        plain = [f"{q.asked()} {q.answer}" for _, q in pairs]
        return lenses.contextual_index(
            model, [model.prepare(text=plain[i : i + data.SIZE]) for i in range(0, len(plain), data.SIZE)]
        )
    texts = [f"{q.prompt()} {q.answer}" for _, q in pairs]
    batches = data.prepared(model, texts, measures.images_of([scene for scene, _ in pairs]))
    return lenses.contextual_index(model, batches)


def _said_of_patches(
    model: Any,
    scenes: Sequence[world.Scene],
    attribute: str,
    names: Sequence[str],
    index: lenses.ContextualIndex | None,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of patches more than half on an object: what each layer says, the truth, and the scene."""
    texts = ["<image>\nquestion: how many objects are there? answer:"] * len(scenes)
    said, truth, scene = [], [], []
    shares = [data.covered(world.masks(s)[0]) for s in scenes]
    tokens = data.first_tokens(model, names).tolist()
    for i, batch in enumerate(data.prepared(model, texts, measures.images_of(scenes))):
        if index is None:
            reading = lenses.logit_lens(model, batch, final_norm=True, position="image", tokens=tokens)
        else:
            reading = lenses.latent_lens(model, batch, index, words=names, centred=centred)
        strongest = reading.scores.argmax(-1)
        for entry, (row, patch) in enumerate(zip(reading.rows, reading.patches, strict=True)):
            number = i * data.SIZE + row
            assert patch is not None
            if float(shares[number][patch]) > 0.5:
                said.append(strongest[entry])
                truth.append(names.index(getattr(scenes[number].things[0], attribute)))
                scene.append(number)
    return torch.stack(said), torch.tensor(truth), torch.tensor(scene)


def _by_scene(right: Tensor, scene: Tensor) -> Tensor:
    """The share that is right of each scene's patches, [scene, layer]."""
    return torch.stack([right[scene == s].float().mean(0) for s in scene.unique()])


def _estimate(values: Tensor) -> str:
    of: Estimate = bootstrap(values[:, None], n_resamples=2000)
    return f"{of.mean:.3f} ({of.low:.3f} to {of.high:.3f})"


def _said(values: Sequence[float]) -> str:
    return _estimate(torch.tensor(values))
