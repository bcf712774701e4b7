"""The report on a question about an image: how does the image get into the answer?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.grids import answer_layout
from methods_multimodal.core.outputs import vocabulary_logits
from methods_multimodal.lenses.direct_attribution import LogitAttribution, attribute_tokens
from methods_multimodal.lenses.logit_lens import LogitLens, logit_lens
from methods_multimodal.patching.activation_patching import (
    ActivationPatching,
    patch_heads,
    patch_positions,
)
from methods_multimodal.plots import head_shares, lens_table, mosaic, overlay, patch_effects, picture, tiles
from methods_multimodal.relevance.attention_maps import HeadMaps, head_maps
from methods_multimodal.report._page import (
    LETTERS,
    Report,
    as_seen,
    new_page,
    rounded,
    spread,
    strongest,
    windows,
)
from mm_adapters import HookedModel, InputError

TOWER = "language"


@dataclass(frozen=True)
class Found:
    """Everything the page shows. `target` says in words what the effects are about."""

    answers: tuple[str, ...]
    target: str
    lens: LogitLens
    maps: HeadMaps
    shares: LogitAttribution
    heads: ActivationPatching
    patches: ActivationPatching
    grid: tuple[int, int]

    @property
    def patch_effect(self) -> Float[Tensor, "layer down across"]:
        """The effect of each window of patches."""
        return rearrange(
            self.patches.effect[0], "layer (down across) -> layer down across", down=self.grid[0]
        )


def vlm_report(
    model: HookedModel,
    images: Sequence[Any],
    question: str,
    names: Sequence[str] = ("image", "counterpart"),
    *,
    called: str = "",
) -> Report:
    """Explains the first token of the answer about the first image.

    The second image is what activation patching compares the first with. `called` is the model's
    name on the page.

    Raises: InputError if there are not two images, or no question.
    """
    if len(images) != 2 or not question.strip():
        raise InputError(
            f"This report compares two images and takes a question; there are {len(images)}, {question!r}."
        )
    prompt = prompt_of(model, question)
    clean, corrupted = (model.prepare(text=[prompt], images=[image]) for image in images)
    seen = [as_seen(model, given["pixel_values"].flatten(0, -4)[0]) for given in (clean, corrupted)]
    return _draw(model, _find(model, clean, corrupted), seen, question, names, called or model.sitemap.family)


def prompt_of(model: HookedModel, question: str) -> str:
    """The question as this model is asked it: by its chat template, if it came with one."""
    processor = getattr(model.inputs, "processor", None)
    if getattr(processor, "chat_template", None) is None:
        return question
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)  # type: ignore[union-attr]


def _find(model: HookedModel, clean: dict[str, Any], corrupted: dict[str, Any]) -> Found:
    view = model.tower(TOWER)
    layout = answer_layout(model, clean["input_ids"], clean.get("attention_mask"), clean["pixel_values"])
    n_prompt = clean["input_ids"].shape[1]
    spoken = [
        model.generate(**given, max_new_tokens=16, do_sample=False)[0, n_prompt:]
        for given in (clean, corrupted)
    ]
    first, other = (int(ids[0]) for ids in spoken)
    name = name_of(model)
    target = f"{name(first)!r}" if first == other else f"{name(first)!r} − {name(other)!r}"

    def metric(output: Any) -> Tensor:
        logits = vocabulary_logits(model, output)[:, -1]
        return logits[:, first] if first == other else logits[:, first] - logits[:, other]

    tokens = [first] if first == other else [first, other]
    shares = attribute_tokens(model, clean, tokens, names=[repr(name(t)) for t in tokens])
    layers = range(view.cfg.n_layers)
    groups, grid = windows(layout)
    return Found(
        answers=tuple(view.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in spoken),
        target=target,
        lens=logit_lens(model, clean, final_norm=True),
        maps=head_maps(model, clean, layout, tower=TOWER, layers=layers, query=-1, query_name="last token"),
        shares=shares.minus(0, 1) if len(tokens) > 1 else shares,
        heads=patch_heads(model, clean, corrupted, metric, tower=TOWER, layers=layers),
        patches=patch_positions(
            model, clean, corrupted, metric, tower=TOWER, layers=spread(len(layers)), units=groups
        ),
        grid=grid,
    )


def name_of(model: HookedModel, tower: str = TOWER) -> Callable[[int], str]:
    """A token's text."""
    return model.tower(tower).to_single_str_token


def _draw(
    model: HookedModel, found: Found, seen: Sequence[Any], question: str, names: Sequence[str], called: str
) -> Report:
    page = new_page(17.0, 15.0, f"{called}: “{question}”   target: logit of {found.target}")
    grid = page.add_gridspec(3, 3)
    for i, name in enumerate(names):
        picture(seen[i], page.add_subplot(grid[0, i]), title=f"{LETTERS[i]}: {name}, as the model sees it",
                caption=fill(f"answer: {found.answers[i]}", 50))  # fmt: skip
    lens_table(found.lens, name_of(model), page.add_subplot(grid[0, 2]))
    mosaic(found.maps, page.add_subplot(grid[1, 0]), title="A: attention of the last token over patches")
    bars = head_shares(found.shares, page.add_subplot(grid[1, 1]))
    bars.set_title(
        f"{bars.get_title()}\nresidual of the sum {found.shares.residual:.1e} of the logit", fontsize=10
    )
    patch_effects(found.heads, page.add_subplot(grid[1, 2]), title="patching each head of A into B")
    effect = found.patch_effect
    where = f"patching each patch of A into B, at the input of layer {found.patches.layers[0]}"
    unit = "effect (0 corrupted, 1 clean)"
    overlay(effect[0], seen[0], page.add_subplot(grid[2, 0]), unit=unit, signed=True, title=where)
    names_of_layers = [f"into layer {i}" for i in found.patches.layers]
    title = "the same at each layer's input"
    tiles(effect, page.add_subplot(grid[2, 1:]), names=names_of_layers, unit=unit, signed=True, title=title)
    return Report(page, _numbers(model, found, question, names, called), tuple(_lines(found, names)))


def _lines(found: Found, names: Sequence[str]) -> list[str]:
    effect = found.patch_effect[0]
    best = int(effect.abs().argmax())
    return [
        *(f"{name}: answer {answer!r}" for name, answer in zip(names, found.answers, strict=True)),
        f"attribution to {found.target}: sum {float(found.shares.total[0, 0]):+z.5f}, the model's own "
        f"{float(found.shares.logit[0, 0]):+z.5f}, residual {found.shares.residual:.1e}",
        f"strongest image patch: row {best // found.grid[1]}, column {best % found.grid[1]} of "
        f"{found.grid[0]} x {found.grid[1]}, effect {float(effect.flatten()[best]):+z.3f}",
        "strongest heads by patching: "
        + ", ".join(f"layer {a} head {b} {v:+z.3f}" for a, b, v in strongest(found.heads.effect[0])),
    ]


def _numbers(
    model: HookedModel, found: Found, question: str, names: Sequence[str], called: str
) -> dict[str, Any]:
    likely, ids = found.lens.top(5)
    name = name_of(model)
    return {
        "model": called,
        "question": question,
        "images": list(names),
        "answers": list(found.answers),
        "target": found.target,
        "logit_lens": [
            [{"token": name(t), "probability": round(p, 6)} for t, p in zip(line, values, strict=True)]
            for line, values in zip(ids.tolist(), likely.tolist(), strict=True)
        ],
        "attention_last_to_patches": rounded(found.maps.maps[0]),
        "attribution": {
            "heads": rounded(found.shares.heads[0, 0]),
            "parts": found.shares.shares(),
            "sum": float(found.shares.total[0, 0]),
            "logit": float(found.shares.logit[0, 0]),
            "residual": found.shares.residual,
        },
        "patching": {
            "clean": float(found.heads.clean[0]),
            "corrupted": float(found.heads.corrupted[0]),
            "heads": rounded(found.heads.effect[0]),
            "patch_layers": list(found.patches.layers),
            "patches": rounded(found.patch_effect),
        },
    }
