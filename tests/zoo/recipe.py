"""What the zoo's recipes give from their seeds: `python -m tests.zoo.recipe` writes it down again.

Scenes, captions, questions and foils are exact. Losses are those of untrained models, weights those after
two steps of each stage, with less data; they may differ by rounding from one processor to another.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn

from mm_adapters.zoo import (
    _training,
    binding,
    captions,
    cards,
    clip,
    drawing,
    judges,
    labels,
    llava,
    measures,
    path,
    questions,
    samples,
    sd,
    tokenizer,
    twins,
    vae,
    world,
)
from mm_adapters.zoo.models_at import load
from tests.methods.plots.shown import numbers

SHOWN = Path(__file__).with_name("recipe.json")
RECIPES: dict[str, Callable[[], Any]] = {}


def recipe(make: Callable[[], Any]) -> Callable[[], Any]:
    RECIPES[make.__name__] = make
    return make


def digest(array: Any) -> Any:
    """An array's shape, mean, spread and where it is large: the same but for rounding."""
    values = np.asarray(array, np.float64)
    flat = values.ravel()
    middle = float((flat * np.linspace(0, 1, flat.size)).mean())
    return [list(values.shape), *numbers([float(flat.mean()), float(flat.std()), middle])]


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([*seed])


@recipe
def scenes() -> Any:
    """Every split and kind: what is in them, their pictures and their masks."""
    out: dict[str, Any] = {}
    for split in ("train", "validation", "test", "novel", "spurious"):
        try:
            some = [world.scene(i, split, 5) for i in range(24)]
        except Exception as error:  # noqa: BLE001  A split that is not there says so.
            out[split] = type(error).__name__
            continue
        out[split] = {
            "said": hashlib.sha256(repr([asdict(s) for s in some]).encode()).hexdigest()[:16],
            "pictures": digest(world.render_batch(some)),
            "large": digest(world.render(some[3], 96)),
            "masks": [digest(world.masks(s)) for s in some[:6]],
            "numbered": [digest(world.index_map(s)) for s in some[:6]],
        }
    for kind in ("one", "two", "many"):
        some = [world.scene(i, "train", 1, kind=kind, solid=i % 2 == 0) for i in range(12)]
        out[kind] = [[[t.shape, t.colour, t.size, t.texture, t.position] for t in s.things] for s in some]
    sized = [world.scene(i, "train", 1, kind="one", size="large").things[0].radius for i in range(4)]
    return out | {"large": numbers(sized)}


@recipe
def samples_drawn() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        samples.main(Path(folder))
        return {p.stem: digest(np.asarray(Image.open(p))) for p in sorted(Path(folder).glob("*.png"))}


@recipe
def claims() -> Any:
    """Captions of all kinds, their foils, and the words they are put into."""
    out = []
    for i in range(60):
        about, lots = world.scene(i, "train", 2), rng(i)
        said = captions.caption(about, lots)
        whole, foil = captions.full_caption(about, lots), captions.foil(said, lots)
        texts = [c.text(**captions.wording(lots)) for c in (said, whole, foil)]
        truth = captions.truth([about], [said, whole, foil])[0].tolist()
        out.append([*texts, truth])
    return out


@recipe
def twin_claims() -> Any:
    out = []
    for i in range(48):
        one, other, said, counter = twins.pair(world.scene(i, "train", 3), rng(i, 1))
        changed = digest(world.render_batch([one, other]))
        out.append([said.text(), counter.text(), changed])
    return out


@recipe
def asked() -> Any:
    one = [questions.question(i, "train", 4)[1] for i in range(60)]
    many = [q for i in range(6) for q in questions.several(world.scene(i), 5, rng(i))]
    rate = questions.best_guess_rate(one)
    told = [[q.kind, q.prompt(), q.answer] for q in one]
    return {"one": told, "several": [[q.asked(), q.answer] for q in many], "guess": rate}


@recipe
def tokens() -> Any:
    text = "a photo of two striped triangles on a purple background, zebra 12"
    of_clip, of_llava = tokenizer.clip_tokenizer(), tokenizer.llava_tokenizer()
    out: dict[str, Any] = {"words": tokenizer.words()}
    for name, one in (("clip", of_clip), ("llava", of_llava)):
        ids = one(text).input_ids
        special = {k: v for k, v in one.special_tokens_map.items() if isinstance(v, str)}
        out[name] = {"n": len(one), "ids": ids, "back": one.decode(ids), "special": special,
                     "side": one.padding_side, "most": one.model_max_length}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_clip_tokenizer(of_clip, Path(folder))
        for name in ("vocab.json", "merges.txt"):
            out[name] = hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest()[:16]
    return out


@recipe
def schedules() -> Any:
    plans = {
        n: getattr(clip, n) for n in ("WORDS", "EYE", "BOTH", "TWINS", "FINISH", "POLISH", "JOIN", "BIND")
    }
    plans |= {n: getattr(clip, n) for n in ("RELATE", "SETTLE")}
    plans |= {"llava": llava.SCHEDULE, "vae": vae.SCHEDULE, "sd": sd.SCHEDULE, "sd more": sd.MORE}
    constants = [clip.SIMPLE_STEPS, clip.PATCH_WEIGHT, clip.EYE_BATCH, clip.EYE_START, clip.BOTH_START]
    constants += [clip.TWINS_START, clip.BATCH, llava.BATCH, llava.ASKED, llava.N_PATCHES, vae.BATCH]
    constants += [vae.KL_WEIGHT, vae.OBJECT_WEIGHT, sd.BATCH, sd.N_TRAINING, sd.CAPTION_DROPOUT, sd.SIDE]
    constants += [clip.BIND_START, clip.JOIN_START, clip.JOINT_WEIGHT, sd.N_FIRST, sd.FIRST_STEP]
    constants += [
        binding.SWAPPED,
        binding.FORMS,
        binding.SWAPPED_OR_MOVED,
        binding.MOSTLY_MOVED,
        binding.MOSTLY_RELATED,
        sd.OBJECT_WEIGHT,
        sd.HEADS_WEIGHT,
        sd.UNNAMED,
        clip.MEAN,
        clip.STD,
    ]
    rates = {n: numbers([p.rate(s) for s in (0, 1, 60, 300, 700)]) for n, p in plans.items()}
    return {"plans": {n: asdict(p) for n, p in plans.items()}, "rates": rates, "constants": constants}


def weights(model: nn.Module) -> Any:
    """How many weights there are, their size together, and the sum of the first and of the last tensor."""
    sizes = [float(p.detach().double().abs().sum()) for p in model.parameters()]
    return {
        "n": sum(p.numel() for p in model.parameters()),
        "sizes": numbers([sum(sizes), sizes[0], sizes[-1]]),
    }


def in_float32() -> Any:
    """As on a processor without bfloat16, on any."""
    return mock.patch.object(_training, "_has_bfloat16", return_value=False)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@recipe
def losses_of_clip() -> Any:
    student, words = clip.Student(clip.build(3)), tokenizer.clip_tokenizer()
    with torch.no_grad():
        out = {f"loss {step}": float(clip.loss(student, words, step, 1, 10)) for step in (0, 549, 550, 900)}
        out |= {f"twins {step}": float(clip.twin_loss(student, words, step, 1, 12)) for step in (0, 7)}
        out["patches weigh"] = float(clip.twin_loss(student, words, 0, 1, 12, patch_weight=3.0))
        with mock.patch.object(clip, "EYE_BATCH", 12):
            out["eye"] = float(clip.eye_loss(student, 2, 1))
        out |= {f"finish {step}": float(clip.finishing_loss(student, words, step, 1, 1.5)) for step in (4, 5)}
        with mock.patch.object(clip, "BATCH", 10), mock.patch.object(clip, "EYE_BATCH", 12):
            joined = clip.Student(clip.build(3), joint=True)
            out |= {f"bind {step}": float(clip.binding_loss(joined, words, step, 1)) for step in (1, 3)}
            out |= {f"relate {step}": float(clip.relating_loss(joined, words, step, 1)) for step in (1, 2)}
            out["settle"] = float(clip.settling_loss(joined, words, 1, 1))
            out["join"] = float(clip.joining_loss(joined, 2, 1))
    process = clip.processor()
    picture = Image.fromarray(world.render(world.scene(1), 100))
    pixels = process.image_processor(images=picture, return_tensors="pt").pixel_values
    return out | {"build": weights(student), "pixels": numbers(pixels[0, :, ::21, 30].tolist())}


@recipe
def losses_of_llava() -> Any:
    model, words = llava.build(clip.build(3), 4), tokenizer.llava_tokenizer()
    packed = llava.pack([questions.several(world.scene(i), 2, rng(i)) for i in range(3)], words)
    with torch.no_grad(), in_float32():
        value = float(llava.loss(model, words, 3, 1))
    kept = {name: digest(tensor.numpy()) for name, tensor in packed.items()}
    process = llava.processor()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "why?"}]}]
    told = process.apply_chat_template([*chat, {"role": "assistant", "content": chat[0]["content"][1:]}])
    ids = process(images=samples_of(1), text="<image>\nhow?", return_tensors="pt").input_ids
    return {"loss": value, "packed": kept, "build": weights(model), "chat": told, "ids": ids.tolist()[0][-6:],
            "length": ids.shape[1], "generation": model.generation_config.to_diff_dict()}  # fmt: skip


def samples_of(n: int) -> list[Image.Image]:
    return [Image.fromarray(world.render(world.scene(i), 64)) for i in range(n)]


@recipe
def losses_of_sd() -> Any:
    coder, denoiser = vae.build(2), sd.build(1)
    student, text_tower = sd.Student(denoiser), sd.text_tower_of(clip.build(3))
    with torch.no_grad():
        of_vae = float(vae.loss(coder, 3, 1, 6))
        flat = vae.latents(coder, [world.scene(i) for i in range(5)], 2)
        data = sd.encode_training_set(coder, text_tower, 1, 40)
        with in_float32():
            value = float(sd.loss(student, sd.scheduler(), data, 2, 1))
    parts = {n: digest(getattr(data, n).numpy()) for n in ("latents", "states", "empty", "weight")}
    numbers_of = [*range(40), *range(sd.N_FIRST, sd.N_FIRST + 40)]
    texts = [sd.training_caption(sd.training_scene(i, 1), i, 1) for i in numbers_of]
    kinds = [[len(s.things), s.things[0].size] for s in (sd.training_scene(i) for i in range(24))]
    return {
        "vae": of_vae,
        "latents": numbers([float(flat.sum()), *flat[4].flatten()[:3].tolist()]),
        "loss": value,
        "data": parts,
        "shown": [digest(x.numpy()) for x in data.shown],
        "captions": texts,
        "kinds": kinds,
        "build": [weights(coder), weights(student)],
        "scheduler": {k: v for k, v in sd.scheduler().config.items() if not k.startswith("_")},
    }


@recipe
def trained() -> Any:
    """Two steps of each stage, with small batches: what is left, and what is written."""
    small = {
        (clip, "BATCH"): 8,
        (clip, "EYE_BATCH"): 8,
        (llava, "BATCH"): 4,
        (sd, "BATCH"): 4,
        (vae, "BATCH"): 4,
    }
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, one_thread():
        work = Path(folder)
        patches = [mock.patch.object(module, name, value) for (module, name), value in small.items()]
        patches += [mock.patch.object(sd, "N_TRAINING", 24), mock.patch.object(sd, "N_FIRST", 12)]
        patches += [in_float32()]
        patches += [mock.patch.object(clip.loss, "__defaults__", (8,))]
        patches += [mock.patch.object(clip.twin_loss, "__defaults__", (8,))]
        for patch in patches:
            patch.start()
        try:
            eye = clip.train(work / "work", steps=2, seed=1)
            out["clip"] = [weights(eye), float(eye.logit_scale.detach())]
            out["llava"] = weights(llava.train(work / "work", eye, steps=2, seed=1))
            pipeline = sd.train(work / "work", eye, steps=2, seed=1)
        finally:
            for patch in patches:
                patch.stop()
        out["sd"] = [weights(pipeline.unet), weights(pipeline.vae), float(pipeline.vae.config.scaling_factor)]
        clip.save(eye, work / "tiny-clip")
        sd.save(pipeline, work / "tiny-sd")
        for name in ("tiny-clip", "tiny-sd"):
            model, _ = load(work / name, name)
            out[f"{name} written"] = weights(model if name == "tiny-clip" else model.unet)
            out[f"{name} files"] = sorted(
                str(p.relative_to(work)) for p in (work / name).rglob("*") if p.is_file()
            )
    return out


@recipe
def judged() -> Any:
    some = [world.scene(i, "test", kind="one", solid=True) for i in range(60)]
    said = [asdict(judges.judge(world.render(s))) for s in some]
    empty = asdict(judges.judge(np.full((64, 64, 3), 128, np.uint8)))
    return {"said": said, "empty": empty}


@recipe
def measured() -> Any:
    """The shipped models on few samples."""
    eye, process = load(path("tiny-clip"), "tiny-clip")
    answerer, asks = load(path("tiny-llava"), "tiny-llava")
    pipeline, _ = load(path("tiny-sd"), "tiny-sd")
    with mock.patch.object(measures, "max", return_value=300, create=True):
        found = measures.measure_clip(eye, process, 40) + measures.measure_llava(answerer, asks, 24)
    found += drawing.measure_sd(pipeline, eye, process, 2)
    rows = [[m.name, m.value, m.n, m.at_least, m.at_most, m.bound(), m.passes()] for m in found]
    return rows + [measures.prompts(a) for a in measures.ATTRIBUTES]


@recipe
def carded() -> Any:
    found = [measures.Measure("a thing", 0.625, 8, 0.5), measures.Measure("another", 0.9, 5, at_most=0.2)]
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        stages = {"tiny-clip": {"steps_done": 30, "seconds": 150.0, "run": {}}}
        run = {"seed": 3, "threads": 1, "device": "cpu", "stages": stages, "note": "A note."}
        (Path(folder) / "training.json").write_text(json.dumps(run))
        cards.write("tiny-clip", Path(folder), found)
        out["text"] = (Path(folder) / "README.md").read_text("utf-8").splitlines()
        out["sheet"] = digest(np.asarray(Image.open(Path(folder) / "world.png")))
    sheet = cards._grid(samples_of(5), ["a text that is wrapped into lines", "b", "c", "d", "e"], 3, 48)
    return out | {"grid": [list(sheet.size), float(np.asarray(sheet).mean())]}


@recipe
def labelled() -> Any:
    about = [world.scene(i, "test") for i in range(8)]
    masks = [{name: int(mask.sum()) for name, mask in labels.masks_of(s).items()} for s in about]
    large = {name: int(mask.sum()) for name, mask in labels.masks_of(about[0], 96).items()}
    return {"masks": masks, "large": large, "captions": [labels.caption_of(n) for n in labels.NAMES],
            "members": list(labels.MEMBER_OF)}  # fmt: skip


def made(name: str) -> Any:
    """What a recipe gives, as plain data."""
    return json.loads(json.dumps(RECIPES[name]()))


def main() -> None:
    lines = (f"{json.dumps(name)}: {json.dumps(made(name))}" for name in RECIPES)
    SHOWN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
