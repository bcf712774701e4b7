"""tiny-llava: tiny-clip's frozen eye, a projector, and a small Llama that answers questions.

Training asks several questions about each image in one sequence: each question sees the image and
itself but no other question, so its states are the same as if it had been asked alone.
"""

# The libraries annotate these constructors and calls more narrowly than they accept.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mm_adapters.zoo import questions, world
from mm_adapters.zoo._training import Schedule, device, fit, mixed, training_folder
from mm_adapters.zoo.clip import pixels
from mm_adapters.zoo.tokenizer import llava_tokenizer

SCHEDULE = Schedule(steps=2800, peak_rate=1.5e-3, warmup=100, weight_decay=0.05, average=0.99)
BATCH, ASKED = 32, 6
N_PATCHES = 64
IGNORED = -100


def build(clip: CLIPModel, seed: int = 0) -> LlavaForConditionalGeneration:
    """The model before training: tiny-clip's vision tower, frozen; all else random."""
    torch.manual_seed(seed)
    tokenizer = llava_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    config = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=N_PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    tower = model.model.vision_tower
    tower.load_state_dict(_tower_weights(clip, tower), strict=True)
    tower.requires_grad_(False)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=8,
        do_sample=False,
    )
    return model


def _tower_weights(clip: CLIPModel, tower: torch.nn.Module) -> dict[str, Tensor]:
    """tiny-clip's vision weights under the names this tower uses."""
    have = {k: v.float() for k, v in clip.vision_model.state_dict().items()}
    # Some versions of transformers nest the tower once more.
    nested = any(k.startswith("vision_model.") for k in tower.state_dict())
    return {f"vision_model.{k}": v for k, v in have.items()} if nested else have


# A conversation as the model was trained on it: one question, its images before it.
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "question: {% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    " answer:{% else %} "
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}</s>"
    "{% endif %}{% endfor %}"
)


def processor() -> LlavaProcessor:
    """Resizes pictures, and writes one `<image>` out as 64."""
    size = {"height": 64, "width": 64}
    images = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images,
        llava_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


def pack(asked: list[list[questions.Question]], tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Several questions per image as one sequence each: ids, positions, who sees whom, labels."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    prefix = [tokenizer.bos_token_id, *[image] * N_PATCHES]
    flat = [q for row in asked for q in row]
    heads = tokenizer([f"\n{q.asked()}" for q in flat], add_special_tokens=False).input_ids
    tails = tokenizer([f" {q.answer}" for q in flat], add_special_tokens=False).input_ids
    rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
    number = iter(zip(heads, tails, strict=True))
    for row in asked:
        ids, positions, group = list(prefix), list(range(len(prefix))), [0] * len(prefix)
        labels = [IGNORED] * len(prefix)
        for which in range(1, len(row) + 1):
            head, tail = next(number)
            tail = [*tail, tokenizer.eos_token_id]
            ids += head + tail
            positions += range(len(prefix), len(prefix) + len(head) + len(tail))
            group += [which] * (len(head) + len(tail))
            labels += [IGNORED] * len(head) + tail
        rows.append((ids, positions, group, labels))
    length = max(len(row[0]) for row in rows)
    fills = (tokenizer.pad_token_id, 0, -1, IGNORED)
    columns = [
        torch.tensor([row[c] + [fill] * (length - len(row[c])) for row in rows])
        for c, fill in enumerate(fills)
    ]
    ids, positions, group, labels = columns
    order = torch.arange(length)
    same = (group[:, :, None] == group[:, None, :]) | (group[:, None, :] == 0)
    sees = same & (order[None, :, None] >= order[None, None, :])
    return {"input_ids": ids, "position_ids": positions, "attention_mask": sees[:, None], "labels": labels}


def asked_at(step: int, seed: int) -> tuple[list[world.Scene], list[list[questions.Question]]]:
    """What is seen at a step, and asked about each scene."""
    rng = np.random.default_rng([step, seed, 5])
    scenes = [world.scene(step * BATCH + i, "train", seed + 2) for i in range(BATCH)]
    return scenes, [questions.several(scene, ASKED, rng) for scene in scenes]


def loss(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, step: int, seed: int
) -> Tensor:
    """How unexpected the right answers of this step are."""
    scenes, asked = asked_at(step, seed)
    packed = pack(asked, tokenizer)
    packed = {name: value.to(device()) for name, value in packed.items()}
    labels = packed.pop("labels")
    with mixed():
        logits = model(**packed, pixel_values=pixels(scenes), use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def train(
    work: Path, clip: CLIPModel, *, steps: int | None = None, seed: int = 0, resume: bool = False
) -> LlavaForConditionalGeneration:
    """A trained model that looks through this tiny-clip."""
    schedule = SCHEDULE if steps is None else replace(SCHEDULE, steps=steps)
    model, tokenizer = build(clip, seed), llava_tokenizer()
    scenes, asked = asked_at(0, seed)
    shown = [world.render_batch(scenes), asked]
    recipe, stages = sys.modules[__name__], {"tiny-llava": schedule}
    with training_folder(
        work / "tiny-llava", recipe, stages, seed, data=shown, begins_with={"model": model}
    ) as folder:
        model.to(device())
        fit(
            model,
            lambda step: loss(model, tokenizer, step, seed),
            schedule,
            folder / "tiny-llava.safetensors",
            resume=resume,
            seed=seed,
        )
    return model


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Writes an ordinary checkpoint, the weights in half precision."""
    model.half().save_pretrained(folder)
    processor().save_pretrained(folder)
