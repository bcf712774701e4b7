"""tiny-clip: a two-tower contrastive model that learns the world's captions.

Three things differ from plain contrastive training, all because the world's truth is known. A caption
that happens to be true of another image is never that image's negative. Each image also meets a foil,
its own caption with one thing changed (two colours swapped, a relation turned). And linear heads, thrown
away afterwards, read from each patch what object it lies on, which teaches the tower to see in minutes.
"""

# The libraries annotate these constructors and calls more narrowly than they accept.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from mm_adapters.zoo import binding, captions, twins, world
from mm_adapters.zoo._training import Schedule, device, fit, training_folder
from mm_adapters.zoo.tokenizer import CONTEXT, clip_tokenizer, save_clip_tokenizer

# The words first, then the eye alone (patches must name their objects), then both together. From the
# captions alone the tower learns colours within minutes and shapes only after hours.
WORDS = Schedule(steps=1500, peak_rate=1e-3, warmup=100, weight_decay=0.02, stop_after=800)
EYE = Schedule(steps=1400, peak_rate=1.5e-3, warmup=50, weight_decay=0.02, stop_after=1000)
BOTH = Schedule(steps=800, peak_rate=1e-3, warmup=50, weight_decay=0.02, stop_after=600)
TWINS = Schedule(steps=750, peak_rate=1e-3, warmup=40, weight_decay=0.02)
FINISH = Schedule(steps=320, peak_rate=7e-4, warmup=20, weight_decay=0.02)
POLISH = Schedule(steps=600, peak_rate=7e-4, warmup=20, weight_decay=0.02)
JOIN = Schedule(steps=800, peak_rate=1e-3, warmup=50, weight_decay=0.02)
BIND = Schedule(steps=1300, peak_rate=6e-4, warmup=50, weight_decay=0.02, average=0.99, stop_after=760)
RELATE = Schedule(steps=900, peak_rate=5e-4, warmup=40, weight_decay=0.02, average=0.99)
SETTLE = Schedule(steps=450, peak_rate=4e-4, warmup=20, weight_decay=0.02, average=0.98)
STAGES = (
    *("clip-words", "clip-eye", "clip-both", "clip-twins", "clip-finish", "clip-polish"),
    *("clip-join", "clip-bind", "clip-relate", "tiny-clip"),
)
# One object and full captions at first.
SIMPLE_STEPS = 550
PATCH_WEIGHT = 0.5
JOINT_WEIGHT = 1.0
EYE_BATCH = 96
# Scenes of later stages are new ones.
EYE_START, BOTH_START, TWINS_START = 1_000_000, 20_000, 3_000_000
BIND_START, JOIN_START, RELATE_START, SETTLE_START = 5_000_000, 7_000_000, 9_000_000, 11_000_000
BATCH = 128
MEAN, STD = 0.5, 0.5


class Student(nn.Module):
    """The model and the linear heads that are thrown away after training.

    With `joint`, also those that name which values belong together.
    """

    def __init__(self, clip: CLIPModel, *, joint: bool = False) -> None:
        super().__init__()
        self.clip = clip
        width = clip.config.vision_config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(v)) for name, v in captions.VALUES.items()})
        self.joint = binding.Heads(width, clip.config.projection_dim) if joint else None


def build(seed: int = 0) -> CLIPModel:
    """The untrained model: 4 layers of width 128 in each tower, patches of 8 pixels."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    tower = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": 128,
        # As in the OpenCLIP checkpoints; several times cheaper on a CPU than the quick variant.
        "hidden_act": "gelu",
    }
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, **special}
    config = CLIPConfig(
        text_config={**tower, **text},
        vision_config={**tower, "image_size": 64, "patch_size": 8},
        projection_dim=128,
        logit_scale_init_value=math.log(1 / 0.07),
    )
    model = CLIPModel(config)
    # The usual start makes positions 14 times weaker than patches, and learning to use them slow.
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.15)
    return model


def processor() -> CLIPProcessor:
    """Resizes any picture to 64 x 64 and tokenises any text."""
    size = {"height": 64, "width": 64}
    images = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return CLIPProcessor(images, clip_tokenizer())


def pixels(scenes: list[world.Scene]) -> Tensor:
    """The scenes' images as the vision tower takes them, [scene, 3, 64, 64]."""
    batch = torch.from_numpy(world.render_batch(scenes))
    return ((batch.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD).contiguous().to(device())


def said_at(step: int, seed: int, batch: int) -> tuple[list[world.Scene], list[captions.Claim], list[str]]:
    """What is seen at a step, what is said of each scene and then a foil of each, and in which words."""
    rng = np.random.default_rng([step, seed])
    kind = "one" if step < SIMPLE_STEPS else None
    scenes = [world.scene(step * batch + i, "train", seed, kind=kind) for i in range(batch)]
    say = captions.full_caption if step < SIMPLE_STEPS else captions.caption
    claims = [say(scene, rng) for scene in scenes]
    foils = [captions.foil(claim, rng) for claim in claims]
    wordings = [captions.wording(rng) for _ in scenes] * 2
    texts = [c.text(**w) for c, w in zip(claims + foils, wordings, strict=True)]
    return scenes, claims + foils, texts


def loss(
    student: Student,
    tokenizer,
    step: int,
    seed: int,
    batch: int = BATCH,
    *,
    patch_weight: float = PATCH_WEIGHT,
) -> Tensor:
    """How badly images and captions of this step find each other."""
    return _mismatch(student, tokenizer, *said_at(step, seed, batch), patch_weight)


def twins_at(step: int, seed: int, batch: int) -> tuple[list[world.Scene], list[captions.Claim], list[str]]:
    """The same, of scenes that come with a twin that differs in one thing: each claim is the other's foil."""
    rng = np.random.default_rng([step, seed, 3])
    scenes: list[world.Scene] = []
    texts: list[str] = []
    claims: list[captions.Claim] = []
    for i in range(batch // 2):
        one = world.scene(TWINS_START + step * batch + i, "train", seed)
        first, second, claim, counter = twins.pair(one, rng)
        wording = captions.wording(rng)
        scenes += [first, second]
        claims += [claim, counter]
        texts += [claim.text(**wording), counter.text(**wording)]
    return scenes, claims, texts


def twin_loss(
    student: Student,
    tokenizer,
    step: int,
    seed: int,
    batch: int = BATCH,
    *,
    patch_weight: float = PATCH_WEIGHT,
) -> Tensor:
    """The same, on scenes that come with a twin that differs in one thing: each is the other's foil."""
    return _mismatch(student, tokenizer, *twins_at(step, seed, batch), patch_weight)


def bound_at(
    step: int,
    seed: int,
    batch: int,
    start: int = BIND_START,
    chances: Mapping[str, float] = binding.SWAPPED,
    forms: Mapping[str, float] = binding.FORMS,
) -> tuple[list[world.Scene], list[captions.Claim], list[str]]:
    """The same, of scenes of two objects and their twins, in which each has what was the other's."""
    rng = np.random.default_rng([step, seed, 7, *([] if start == BIND_START else [start])])
    scenes: list[world.Scene] = []
    texts: list[str] = []
    claims: list[captions.Claim] = []
    for i in range(batch // 2):
        number = start + step * batch + i
        one = world.scene(number, "train", seed, kind="two", any_radius=bool(i % 2))
        first, second, claim, counter = binding.pair(one, rng, chances, forms)
        wording = {**captions.wording(rng), "order": captions.adjectives(rng)}
        scenes += [first, second]
        claims += [claim, counter]
        texts += [claim.text(**wording), counter.text(**wording)]
    return scenes, claims, texts


def binding_loss(student: Student, tokenizer, step: int, seed: int) -> Tensor:
    """Which object has what; twins and the whole world in every second step."""
    if step % 2 == 0:
        return finishing_loss(student, tokenizer, 10_000 + step // 2, seed, 0.0)
    return _mismatch(student, tokenizer, *bound_at(step, seed, BATCH), 0.0, JOINT_WEIGHT)


def relating_loss(student: Student, tokenizer, step: int, seed: int) -> Tensor:
    """The same, with objects that also change places in two steps of three."""
    if step % 3 == 0:
        return finishing_loss(student, tokenizer, 20_000 + step // 3, seed, PATCH_WEIGHT)
    bound = bound_at(step, seed, BATCH, RELATE_START, binding.SWAPPED_OR_MOVED)
    return _mismatch(student, tokenizer, *bound, 0.0, JOINT_WEIGHT)


def settling_loss(student: Student, tokenizer, step: int, seed: int) -> Tensor:
    """The same, mostly of objects that change places, in every second step."""
    if step % 2 == 0:
        return finishing_loss(student, tokenizer, 30_000 + step // 2, seed, 2 * PATCH_WEIGHT)
    how = (binding.MOSTLY_MOVED, binding.MOSTLY_RELATED)
    return _mismatch(student, tokenizer, *bound_at(step, seed, BATCH, SETTLE_START, *how), 0.0, JOINT_WEIGHT)


def joining_loss(student: Student, step: int, seed: int) -> Tensor:
    """How badly the heads name what this step's objects are, and which values belong together.

    Two scenes of three hold two objects with one attribute swapped between them.
    """
    rng = np.random.default_rng([step, seed, 9])
    first, scenes = JOIN_START + step * EYE_BATCH, []
    for i in range(EYE_BATCH // 3):
        scenes += binding.pair(world.scene(first + i, "train", seed, kind="two", any_radius=i % 2 == 1), rng)[
            :2
        ]
    scenes += [
        world.scene(first + i, "train", seed, any_radius=i % 2 == 1) for i in range(len(scenes), EYE_BATCH)
    ]
    vision = student.clip.vision_model(pixels(scenes), output_hidden_states=True)
    image = nn.functional.normalize(student.clip.visual_projection(vision.pooler_output), dim=-1)
    patches = vision.hidden_states[-2][:, 1:]
    return patch_loss(student, patches, scenes) + _joint_loss(student, image, patches, scenes)


def _joint_loss(student: Student, image: Tensor, patches: Tensor, scenes: list[world.Scene]) -> Tensor:
    assert student.joint is not None
    return student.joint(math.sqrt(image.shape[-1]) * image, patches, scenes)


def _mismatch(
    student: Student,
    tokenizer,
    scenes: list[world.Scene],
    claims: list[captions.Claim],
    texts: list[str],
    patch_weight: float,
    joint_weight: float = 0.0,
) -> Tensor:
    """How badly images and texts find each other: text i is of image i, those behind are of none."""
    tokens = tokenizer(texts, padding=True, return_tensors="pt").to(device())
    allowed = ~torch.from_numpy(captions.truth(scenes, claims)).to(device())
    diagonal = torch.arange(len(scenes), device=allowed.device)
    allowed[diagonal, diagonal] = True

    image, text, patches = _embed(student, scenes, tokens)
    scores = (_scale(student) * image @ text.T).masked_fill(~allowed, float("-inf"))
    by_image = nn.functional.cross_entropy(scores, diagonal)
    by_text = nn.functional.cross_entropy(scores[:, : len(scenes)].T, diagonal)
    off = (by_image + by_text) / 2 + patch_weight * patch_loss(student, patches, scenes)
    return off + joint_weight * _joint_loss(student, image, patches, scenes) if joint_weight else off


def _embed(student: Student, scenes: list[world.Scene], tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of the images and of the texts, and the patches in the layer that tiny-llava reads."""
    model = student.clip
    vision = model.vision_model(pixels(scenes), output_hidden_states=True)
    image = model.visual_projection(vision.pooler_output)
    text = model.get_text_features(**tokens).pooler_output
    image, text = (nn.functional.normalize(x, dim=-1) for x in (image, text))
    return image, text, vision.hidden_states[-2][:, 1:]


def _scale(student: Student) -> Tensor:
    return student.clip.logit_scale.clamp(max=math.log(100.0)).exp()


def patch_loss(student: Student, patches: Tensor, scenes: list[world.Scene]) -> Tensor:
    """How badly the heads name the objects that the patches, [scene, patch, width], lie on."""
    rows, labels = binding.patches_on_objects(scenes, captions.value_numbers)
    chosen = patches.flatten(0, 1)[rows.to(patches.device)]
    targets = labels.to(patches.device).unbind(1)
    losses = [
        nn.functional.cross_entropy(head(chosen), target)
        for head, target in zip(student.heads.values(), targets, strict=True)
    ]
    return torch.stack(losses).mean()


def eye_loss(student: Student, step: int, seed: int) -> Tensor:
    """How badly the heads name the objects in this step's images."""
    first = EYE_START + step * EYE_BATCH
    scenes = [world.scene(first + i, "train", seed) for i in range(EYE_BATCH)]
    vision = student.clip.vision_model(pixels(scenes), output_hidden_states=True)
    return len(student.heads) * patch_loss(student, vision.hidden_states[-2][:, 1:], scenes)


def finishing_loss(student: Student, tokenizer, step: int, seed: int, patch_weight: float) -> Tensor:
    """Twins and the whole world in turn, on scenes not met before."""
    if step % 2:
        return loss(student, tokenizer, 2 * BOTH_START + step, seed, patch_weight=patch_weight)
    return twin_loss(student, tokenizer, TWINS.steps + step, seed, patch_weight=patch_weight)


def train(
    work: Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = False,
    begin: CLIPModel | None = None,
) -> CLIPModel:
    """A trained model; `steps`, if given, is the length of each stage.

    `begin`, a model as it is before the last four stages, saves the others. Beside its checkpoints, `work`
    is left with the models that the others are built on: `tiny-clip/polished`, in whose words tiny-sd reads,
    and `tiny-clip/joined`, through which tiny-llava looks.
    """
    plans = [
        s if steps is None else replace(s, steps=steps, stop_after=None)
        for s in (WORDS, EYE, BOTH, TWINS, FINISH, POLISH, JOIN, BIND, RELATE, SETTLE)
    ]
    student, stages = Student(begin or build(seed)), dict(zip(STAGES, plans, strict=True))
    first = begin or student
    shown = [
        [world.render_batch(scenes), texts]
        for scenes, _, texts in (
            said_at(0, seed, BATCH),
            said_at(BOTH_START, seed, BATCH),
            twins_at(0, seed, BATCH),
            bound_at(0, seed, BATCH),
        )
    ]
    recipe = sys.modules[__name__]
    with training_folder(
        work / "tiny-clip", recipe, stages, seed, data=shown, begins_with={"model": first}
    ) as folder:
        if begin is None:
            _train(student.to(device()), folder, plans, seed, resume)
        student = _bind(student.clip, folder, plans[-4:], seed, resume)
    return student.clip


def _bind(model: CLIPModel, folder: Path, plans: Sequence[Schedule], seed: int, resume: bool) -> Student:
    """The last four stages, from the weights as half precision keeps them.

    In the first the image tower learns what belongs to what, in the second its last layer and the text tower
    learn to say so, in the others all learns again what stands where.
    """
    torch.manual_seed(seed + 1)
    student = Student(copy.deepcopy(model).half().float(), joint=True).to(device())
    tokenizer = clip_tokenizer()
    files = [folder / f"{stage}.safetensors" for stage in STAGES[-4:]]
    towers = student.clip

    def run(number: int, loss_at: Callable[[int], Tensor], *frozen: nn.Module | nn.Parameter) -> None:
        student.requires_grad_(True)
        for part in frozen:
            part.requires_grad_(False)
        fit(student, loss_at, plans[number], files[number], resume=resume, seed=seed)

    of_text = (towers.text_model, towers.text_projection, towers.logit_scale)
    run(0, lambda step: joining_loss(student, step, seed), *of_text)
    save(copy.deepcopy(towers), folder / "joined")
    eye = towers.vision_model
    below = (eye.embeddings, eye.pre_layrnorm, *eye.encoder.layers[:-1])
    run(1, lambda step: binding_loss(student, tokenizer, step, seed), *below)
    run(2, lambda step: relating_loss(student, tokenizer, step, seed))
    run(3, lambda step: settling_loss(student, tokenizer, step, seed))
    with torch.no_grad():
        student.clip.logit_scale.clamp_(max=math.log(100.0))
    return student


def _train(student: Student, folder: Path, plans: Sequence[Schedule], seed: int, resume: bool) -> None:
    files, tokenizer = [folder / f"{stage}.safetensors" for stage in STAGES], clip_tokenizer()

    def run(number: int, loss_at: Callable[[int], Tensor]) -> None:
        fit(student, loss_at, plans[number], files[number], resume=resume, seed=seed)

    run(0, lambda step: loss(student, tokenizer, step, seed))
    student.requires_grad_(False)
    student.clip.vision_model.requires_grad_(True)
    student.heads.requires_grad_(True)
    run(1, lambda step: eye_loss(student, step, seed))
    student.requires_grad_(True)
    run(2, lambda step: loss(student, tokenizer, BOTH_START + step, seed))
    run(3, lambda step: twin_loss(student, tokenizer, step, seed))
    run(4, lambda step: finishing_loss(student, tokenizer, step, seed, PATCH_WEIGHT))
    # What is left to learn is the shape of small objects: the text tower has no part in it.
    student.clip.text_model.requires_grad_(False)
    student.clip.text_projection.requires_grad_(False)
    later = FINISH.steps
    run(5, lambda step: finishing_loss(student, tokenizer, later + step, seed, 5 * PATCH_WEIGHT))
    with torch.no_grad():
        student.clip.logit_scale.clamp_(max=math.log(100.0))
    save(copy.deepcopy(student.clip), folder / "polished")


def save(model: CLIPModel, folder: Path) -> None:
    """Writes an ordinary checkpoint, the weights in half precision."""
    model.half().save_pretrained(folder)
    processor().save_pretrained(folder)
    save_clip_tokenizer(clip_tokenizer(), folder)
