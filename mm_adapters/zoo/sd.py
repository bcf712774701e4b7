"""tiny-sd: a latent diffusion model that draws what a caption says, through tiny-clip's text tower.

Its training set is a finite list: `training_example(i)` for i below `N_TRAINING` is everything the
denoiser has ever seen, which is what data attribution needs.

Two things differ from plain diffusion training. Linear heads, thrown away afterwards, read from the
denoiser's features which shape each place will show: where noise hides the picture only the caption can
tell, so the words find their places in minutes instead of hours. And the places where objects lie, a
small part of the picture and nearly all of what it says, weigh more in the loss.
"""

# The libraries annotate these constructors and calls more narrowly than they accept.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel

from mm_adapters.zoo import captions, vae, world
from mm_adapters.zoo._training import Schedule, device, fit, mixed, seeded, training_folder
from mm_adapters.zoo.captions import Claim, phrase_of
from mm_adapters.zoo.tokenizer import CONTEXT, clip_tokenizer, save_clip_tokenizer

SCHEDULE = Schedule(
    steps=7500, peak_rate=1.2e-3, warmup=150, weight_decay=0.01, average=0.998, stop_after=5400
)
# Then what short captions, two objects and textures ask for, from the weights as half precision keeps them.
MORE = Schedule(steps=3200, peak_rate=1e-3, warmup=100, weight_decay=0.01, average=0.998)
BATCH = 32
# Draws of a stage are not those of the other.
FIRST_STEP = {"sd-first": 0, "tiny-sd": 1_000_000}
# The second part of the training set is met in the second stage only: three rows of four there.
N_FIRST, N_TRAINING = 12288, 24576
CAPTION_DROPOUT = 0.1
SIDE = 16
# How much more a place with an object weighs in the loss, and the heads beside it.
OBJECT_WEIGHT = 4.0
HEADS_WEIGHT = 0.1
# What the heads do not have to name: an object whose shape the caption leaves out.
UNNAMED = -100


def training_example(index: int, seed: int = 0) -> tuple[NDArray[np.uint8], str]:
    """Image and caption number `index` of the training set."""
    about = training_scene(index, seed)
    return world.render(about), training_caption(about, index, seed)


def training_scene(index: int, seed: int = 0) -> world.Scene:
    """What training image number `index` shows.

    In the first part every eighth has two objects, the others one, all solid; large ones are twice as
    common as small ones, because at 16 x 16 latents the shape of a small object is the hardest thing to
    learn. In the second part half have two objects, of any texture and radius.
    """
    if not 0 <= index < N_TRAINING:
        raise IndexError(f"tiny-sd has {N_TRAINING} training images; there is no number {index}.")
    if index >= N_FIRST:
        kind, solid = ("one", "two")[index % 2], index % 5 < 2
        return world.scene(index, "train", seed + 3, kind=kind, solid=solid, any_radius=index % 3 == 0)
    kind = "two" if index % 8 == 7 else "one"
    size = "large" if index % 3 == 0 else None
    return world.scene(index, "train", seed + 3, kind=kind, solid=True, size=size)


def training_caption(about: world.Scene, index: int, seed: int = 0) -> str:
    """The caption of training image number `index`: most of what is true, sometimes less."""
    rng = np.random.default_rng([index, 99, seed])
    if index >= N_FIRST:
        return _later_caption(about, rng)
    background = about.background if rng.random() < 0.75 else None
    if len(about.things) == 2:
        order = (0, 1) if rng.random() < 0.5 else (1, 0)
        first, second = (about.things[i] for i in order)
        relation = next(r for r in world.RELATIONS if world.holds(r, first, second))
        phrases = tuple(phrase_of(thing, ["colour", "shape"]) for thing in (first, second))
        return Claim(phrases, relation, None, background).text()
    chances = {"size": 0.65, "colour": 0.85, "shape": 0.85, "position": 0.65}
    named = [name for name, chance in chances.items() if rng.random() < chance]
    return Claim((phrase_of(about.things[0], named),), None, None, background).text()


def _later_caption(about: world.Scene, rng: np.random.Generator) -> str:
    """A short caption, or most of what is true, the adjectives in any order."""
    short = rng.random() < 0.4
    background = None if short or rng.random() < 0.4 else about.background
    order = captions.adjectives(rng)
    if len(about.things) == 2:
        first, second = (about.things[i] for i in ((0, 1) if rng.random() < 0.5 else (1, 0)))
        relation = next(r for r in world.RELATIONS if world.holds(r, first, second))
        relation = relation if rng.random() < 0.7 else "and"
        dropped = ("colour", "shape")[int(rng.integers(2))] if rng.random() < 0.1 else None
        named = [name for name in ("colour", "shape") if name != dropped]
        more = [name for name in ("size", "texture") if not short and rng.random() < 0.4]
        phrases = tuple(phrase_of(thing, [*named, *more]) for thing in (first, second))
        return Claim(phrases, relation, None, background).text(order=order)
    named = ["colour", "shape"]
    if not short:
        chances = {"size": 0.5, "texture": 0.6, "colour": 0.85, "shape": 0.85, "position": 0.5}
        named = [name for name, chance in chances.items() if rng.random() < chance]
    elif about.things[0].texture != "solid" and rng.random() < 0.7:
        named.append("texture")
    return Claim((phrase_of(about.things[0], named),), None, None, background).text(order=order)


def build(seed: int = 0) -> UNet2DConditionModel:
    """The untrained denoiser: latents of 16 x 16, cross-attention at 16 and at 8."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=128,
        # diffusers reads this as the number of heads.
        attention_head_dim=2,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Noise that ends at no signal at all, so that flat bright and dark pictures can be drawn."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        # Not used with trailing steps; the pipeline insists on it.
        steps_offset=1,
    )


class Student(nn.Module):
    """The denoiser and the linear heads that are thrown away after training.

    The heads sit on the middle block, 8 x 8 places, and on the first up block, 16 x 16. They name the
    shape at each place, and the other attributes in `named`.
    """

    def __init__(self, unet: UNet2DConditionModel, named: Sequence[str] = ("shape",)) -> None:
        super().__init__()
        self.unet, self.named = unet, named
        width = unet.config.block_out_channels[-1]
        numbers = [len(captions.VALUES[name]) + 1 for _ in range(2) for name in named]
        self.heads = nn.ModuleList(nn.Conv2d(width, number, 1) for number in numbers)

    def forward(self, noisy: Tensor, times: Tensor, states: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The predicted velocity, and each head's scores [row, shape or none, place, place]."""
        features: list[Tensor] = []
        watched = (self.unet.mid_block, self.unet.up_blocks[0])
        hooks = [part.register_forward_hook(lambda _, __, out: features.append(out)) for part in watched]
        try:
            velocity = self.unet(noisy, times, states).sample
        finally:
            for hook in hooks:
                hook.remove()
        features = [x for x in features for _ in self.named]
        return velocity.float(), [head(x).float() for head, x in zip(self.heads, features, strict=True)]


@dataclass(frozen=True)
class Encoded:
    """The training set as the denoiser meets it.

    Scaled latents [image, 4, 16, 16], text states [image, position, width] and those of "". The weight of
    each place [image, 1, 16, 16], and what each place of 8 x 8 and of 16 x 16 shows, for each of the
    student's heads: a value's number, or as many as there are values for the ground.
    """

    latents: Tensor
    states: Tensor
    empty: Tensor
    weight: Tensor
    shown: tuple[Tensor, ...]


@torch.no_grad()
def encode_texts(text_tower: CLIPTextModel, texts: list[str]) -> Tensor:
    """Text states as the pipeline forms them, [text, position, width]: padded, without a mask."""
    tokenizer = clip_tokenizer()
    parts = [texts[i : i + 256] for i in range(0, len(texts), 256)]
    options = {"padding": "max_length", "max_length": CONTEXT, "truncation": True, "return_tensors": "pt"}
    where = next(text_tower.parameters()).device
    return torch.cat([text_tower(tokenizer(part, **options).input_ids.to(where))[0] for part in parts])


@torch.no_grad()
def encode_training_set(
    autoencoder: AutoencoderKL,
    text_tower: CLIPTextModel,
    seed: int = 0,
    n: int | None = None,
    named: Sequence[str] = ("shape",),
) -> Encoded:
    """The first `n` training images and captions (all if None), encoded once."""
    scenes = [training_scene(i, seed) for i in range(N_TRAINING if n is None else n)]
    texts = [training_caption(about, i, seed) for i, about in enumerate(scenes)]
    latents = vae.latents(autoencoder, scenes) * autoencoder.config.scaling_factor
    states = encode_texts(text_tower, [*texts, ""])
    shown = [what_is_shown(scenes, texts, side, name) for side in (SIDE // 2, SIDE) for name in named]
    covered = (shown[-1] != len(captions.VALUES[named[-1]])).float()[:, None]
    weight = 1 + OBJECT_WEIGHT * nn.functional.max_pool2d(covered, 3, 1, 1)
    where = device()
    return Encoded(
        latents.to(where),
        states[:-1].to(where),
        states[-1].to(where),
        weight.to(where),
        tuple(one.to(where) for one in shown),
    )


def what_is_shown(scenes: list[world.Scene], texts: list[str], side: int, name: str = "shape") -> Tensor:
    """The number of the shape (or the attribute `name`) at each place, [image, side, side].

    The ground has a number of its own, and what the text does not say is `UNNAMED`.
    """
    middle, values = (np.arange(side) + 0.5) * world.FRAME / side, captions.VALUES[name]
    out = np.full((len(scenes), side, side), len(values))
    for number, (about, text) in enumerate(zip(scenes, texts, strict=True)):
        said = set(text.split())
        for thing in about.things:
            near = np.hypot(middle[None, :] - thing.x, middle[:, None] - thing.y) < thing.radius
            value = getattr(thing, name)
            out[number, near] = values.index(value) if value in said else UNNAMED
    return torch.from_numpy(out)


def loss(student: Student, noising: DDIMScheduler, data: Encoded, step: int, seed: int) -> Tensor:
    """How far the predicted velocities of this step are off, and how badly the heads name shapes."""
    generator = seeded(step, seed)
    n = len(data.latents)
    rows = torch.randint(n, (BATCH,), generator=generator)
    if n > N_FIRST:
        rows = torch.where(torch.arange(BATCH) % 4 == 0, rows % N_FIRST, N_FIRST + rows % (n - N_FIRST))
    times = torch.randint(noising.config.num_train_timesteps, (BATCH,), generator=generator)
    noise = torch.randn((BATCH, *data.latents.shape[1:]), generator=generator)
    dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
    where = data.latents.device
    rows, times, noise, dropped = (x.to(where) for x in (rows, times, noise, dropped))
    latents = data.latents[rows]
    states = torch.where(dropped[:, None, None], data.empty, data.states[rows])
    noisy = noising.add_noise(latents, noise, times)
    target = noising.get_velocity(latents, noise, times)
    with mixed():
        velocity, named = student(noisy, times, states)
    weight = data.weight[rows]
    off = (weight / weight.mean() * (velocity - target).square()).mean()
    for scores, shown in zip(named, data.shown, strict=True):
        labels = shown[rows].masked_fill(dropped[:, None, None], UNNAMED)
        off = off + HEADS_WEIGHT * nn.functional.cross_entropy(scores, labels, ignore_index=UNNAMED)
    return off


def text_tower_of(clip: CLIPModel) -> CLIPTextModel:
    """tiny-clip's text tower as a model of its own."""
    tower = CLIPTextModel(clip.config.text_config)
    have = {k: v.float() for k, v in clip.text_model.state_dict().items()}
    # Some versions of transformers nest the tower once more.
    nested = any(k.startswith("text_model.") for k in tower.state_dict())
    tower.load_state_dict({f"text_model.{k}": v for k, v in have.items()} if nested else have)
    return tower.eval()


def train(
    work: Path,
    clip: CLIPModel,
    *,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = False,
    begin: StableDiffusionPipeline | None = None,
) -> StableDiffusionPipeline:
    """A trained pipeline that reads captions with this tiny-clip; trains its autoencoder first.

    `begin`, a pipeline as it is after the first stage, saves that stage and the autoencoder's.
    """
    first, more = (s if steps is None else replace(s, steps=steps, stop_after=None) for s in (SCHEDULE, MORE))
    text_tower = text_tower_of(clip)
    if begin is None:
        # A run that is finished is read back from its checkpoint without a step.
        autoencoder = vae.train(work, steps=steps, seed=seed, resume=resume)
        student = Student(build(seed))
        _run(work, "sd-first", student, autoencoder, text_tower, first, N_FIRST, seed, resume)
        begin = assemble(autoencoder, text_tower, student.unet)
    autoencoder, unet = (copy.deepcopy(part).half().float() for part in (begin.vae, begin.unet))
    torch.manual_seed(seed + 1)
    student = Student(unet, ("shape", "colour"))
    _run(work, "tiny-sd", student, autoencoder, text_tower, more, N_TRAINING, seed, resume)
    return assemble(autoencoder, text_tower, student.unet)


def _run(
    work: Path,
    stage: str,
    student: Student,
    autoencoder: AutoencoderKL,
    text_tower: CLIPTextModel,
    schedule: Schedule,
    n: int,
    seed: int,
    resume: bool,
) -> None:
    """One stage, on the first `n` training images; the student is trained in place."""
    noising = scheduler()
    shown = [training_example(i, seed) for i in range(n - BATCH, n)]
    parts = {"model": student, "autoencoder": autoencoder, "text_tower": text_tower}
    recipe = sys.modules[__name__]
    with training_folder(
        work / stage, recipe, {stage: schedule}, seed, data=shown, begins_with=parts
    ) as folder:
        encoded = encode_training_set(
            autoencoder.to(device()), text_tower.to(device()), seed, n, student.named
        )
        student.to(device())
        fit(
            student,
            lambda step: loss(student, noising, encoded, FIRST_STEP[stage] + step, seed),
            schedule,
            folder / f"{stage}.safetensors",
            resume=resume,
            seed=seed,
        )


def assemble(
    autoencoder: AutoencoderKL, text_tower: CLIPTextModel, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The pipeline of these parts."""
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_tower,
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Writes an ordinary checkpoint, the weights in half precision."""
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.half()
    pipeline.save_pretrained(folder)
    save_clip_tokenizer(clip_tokenizer(), folder / "tokenizer")
