"""The report on a question about an image: how does the image get into the answer?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.grids import one_grid
from methods_multimodal.core.kept import Kept, kept
from methods_multimodal.core.model import check_sites
from methods_multimodal.core.outputs import answer_ids, vocabulary_logits
from methods_multimodal.lenses.direct_attribution import LogitAttribution, attribute_tokens
from methods_multimodal.lenses.logit_lens import logit_lens
from methods_multimodal.lenses.reading import LensReading
from methods_multimodal.patching.activation_patching import (
    ActivationPatching,
    patch_heads,
    patch_positions,
)
from methods_multimodal.plots import head_shares, lens_table, mosaic, overlay, patch_effects, picture, tiles
from methods_multimodal.relevance.attention_maps import HeadMaps, head_maps
from methods_multimodal.report._page import (
    LETTERS,
    PATCHED_ROWS,
    Report,
    as_seen,
    new_page,
    rounded,
    spread,
    strongest,
    windows,
)
from mm_adapters import InputError, Model
from mm_adapters.inputs.images import to_rgb

TOWER = "language"
NEEDED = ("blocks.0.hook_resid_pre", "blocks.0.attn.hook_pattern", "ln_final.hook_scale")


@dataclass(frozen=True)
class Evidence:
    """Everything the page shows. `target` says in words what the effects are about."""

    answers: tuple[str, ...]
    target: str
    lens: LensReading
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
    model: Model,
    images: Sequence[Any],
    question: str,
    names: Sequence[str] = ("image", "counterpart"),
    *,
    model_name: str = "",
    folder: str | Path | None = None,
) -> Report:
    """Explains the first token of the answer about the first image.

    The second image is what activation patching compares the first with. `model_name` is the model's
    name on the page. With a `folder`, parts are written down as they are done, and are not made again.

    Raises: MissingSiteError if the model has no language tower that unembeds one stream, or one that is given
    no patches; InputError if there are not two images, or no question, or the images are cut into tiles.
    """
    check_sites(model, [f"{TOWER}.{part}" for part in NEEDED])
    if len(images) != 2 or not question.strip():
        raise InputError(
            f"This report compares two images and takes a question; there are {len(images)}, {question!r}."
        )
    prompt = prompt_of(model, question)
    clean, corrupted = (model.prepare(text=[prompt], images=[image]) for image in images)
    pictures = [_shown(model, x["pixel_values"], i) for x, i in zip((clean, corrupted), images, strict=True)]
    with kept(folder, job="vlm_report", models={"model": model}, data=[clean, corrupted]) as work:
        evidence = _gather(model, clean, corrupted, work)
    return _draw(model, evidence, pictures, question, names, model_name or model.name)


def _shown(model: Model, pixels: Tensor, image: Any) -> Any:
    """The picture as the model sees it; as it was given, where it is cut into patches before."""
    if pixels.ndim < 4:
        return np.asarray(to_rgb(image))
    return as_seen(model, pixels.flatten(0, -4)[0])


def prompt_of(model: Model, question: str) -> str:
    """The question as this model is asked it: by its chat template, if it came with one."""
    processor = getattr(model.preparer, "processor", None)
    if getattr(processor, "chat_template", None) is None:
        return question
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)  # type: ignore[union-attr]


def _gather(model: Model, clean: dict[str, Any], corrupted: dict[str, Any], work: Kept) -> Evidence:
    layout = model.layout(**clean)[TOWER]
    one_grid(layout, TOWER)
    lens = work.record("lens", LensReading, lambda: logit_lens(model, clean, final_norm=True))

    @torch.no_grad()
    def answer() -> dict[str, Tensor]:
        return {
            name: model.wrapped.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
            for name, inputs in (("clean", clean), ("corrupted", corrupted))
        }

    answered = work.tensors("answers", answer)
    answers = [
        answer_ids(answered[x], clean["input_ids"][0].to(answered[x].device)) for x in ("clean", "corrupted")
    ]
    first, other = (int(ids[0]) for ids in answers)
    name = name_of(model)
    target = f"{name(first)!r}" if first == other else f"{name(first)!r} − {name(other)!r}"

    last = int(model.row_positions(clean, tower=TOWER)[0])  # Patching runs copies of this one row.

    def metric(output: Any) -> Tensor:
        logits = vocabulary_logits(model, output)[:, last]
        return logits[:, first] if first == other else logits[:, first] - logits[:, other]

    tokens = [first] if first == other else [first, other]
    shares = work.record(
        "shares",
        LogitAttribution,
        lambda: attribute_tokens(model, clean, tokens, names=[repr(name(t)) for t in tokens]),
    )
    layers = range(model.check_tower(TOWER).n_layers())
    decode = model.tokenizer_of(TOWER).decode
    groups, grid = windows(layout)
    looked: dict[str, Any] = {"tower": TOWER, "layers": layers, "query": -1, "query_name": "last token"}
    every: dict[str, Any] = {"tower": TOWER, "batch": PATCHED_ROWS}
    few: dict[str, Any] = {"layers": spread(len(layers)), "units": groups, **every}
    return Evidence(
        answers=tuple(decode(ids, skip_special_tokens=True).strip() for ids in answers),
        target=target,
        lens=lens,
        maps=work.record("maps", HeadMaps, lambda: head_maps(model, clean, layout, **looked)),
        shares=shares.minus(0, 1) if len(tokens) > 1 else shares,
        heads=work.record(
            "heads",
            ActivationPatching,
            lambda: patch_heads(
                model, clean, corrupted, metric, layers=layers, folder=work.inside("patched heads"), **every
            ),
        ),
        patches=work.record(
            "patches",
            ActivationPatching,
            lambda: patch_positions(
                model, clean, corrupted, metric, folder=work.inside("patched patches"), **few
            ),
        ),
        grid=grid,
    )


def name_of(model: Model, tower: str = TOWER) -> Callable[[int], str]:
    """A token's text."""
    tokenizer = model.tokenizer_of(tower)
    return lambda token: tokenizer.decode([token])


def _draw(
    model: Model,
    evidence: Evidence,
    pictures: Sequence[Any],
    question: str,
    names: Sequence[str],
    model_name: str,
) -> Report:
    page = new_page(17.0, 15.0, f"{model_name}: “{question}”   target: logit of {evidence.target}")
    grid = page.add_gridspec(3, 3)
    for i, name in enumerate(names):
        title, caption = f"{LETTERS[i]}: {name}, as the model sees it", f"answer: {evidence.answers[i]}"
        picture(pictures[i], page.add_subplot(grid[0, i]), title=title, caption=fill(caption, 50))
    lens_table(evidence.lens, name_of(model), page.add_subplot(grid[0, 2]))
    mosaic(evidence.maps, page.add_subplot(grid[1, 0]), title="A: attention of the last token over patches")
    bars = head_shares(evidence.shares, page.add_subplot(grid[1, 1]))
    bars.set_title(
        f"{bars.get_title()}\nresidual of the sum {evidence.shares.residual:.1e} of the logit", fontsize=10
    )
    patch_effects(evidence.heads, page.add_subplot(grid[1, 2]), title="patching each head of A into B")
    effect = evidence.patch_effect
    where = f"patching each patch of A into B, at the input of layer {evidence.patches.layers[0]}"
    unit = "effect (0 corrupted, 1 clean)"
    overlay(effect[0], pictures[0], page.add_subplot(grid[2, 0]), unit=unit, signed=True, title=where)
    names_of_layers = [f"into layer {i}" for i in evidence.patches.layers]
    title = "the same at each layer's input"
    tiles(effect, page.add_subplot(grid[2, 1:]), names=names_of_layers, unit=unit, signed=True, title=title)
    return Report(
        page, _numbers(model, evidence, question, names, model_name), tuple(_lines(evidence, names))
    )


def _lines(evidence: Evidence, names: Sequence[str]) -> list[str]:
    effect = evidence.patch_effect[0]
    best = int(effect.abs().argmax())
    return [
        *(f"{name}: answer {answer!r}" for name, answer in zip(names, evidence.answers, strict=True)),
        f"attribution to {evidence.target}: sum {float(evidence.shares.total[0, 0]):+z.5f}, the model's own "
        f"{float(evidence.shares.logit[0, 0]):+z.5f}, residual {evidence.shares.residual:.1e}",
        f"strongest image patch: row {best // evidence.grid[1]}, column {best % evidence.grid[1]} of "
        f"{evidence.grid[0]} x {evidence.grid[1]}, effect {float(effect.flatten()[best]):+z.3f}",
        "strongest heads by patching: "
        + ", ".join(f"layer {a} head {b} {v:+z.3f}" for a, b, v in strongest(evidence.heads.effect[0])),
    ]


def _numbers(
    model: Model, evidence: Evidence, question: str, names: Sequence[str], model_name: str
) -> dict[str, Any]:
    likely, ids = evidence.lens.top(5)
    name = name_of(model)
    return {
        "model": model_name,
        "question": question,
        "images": list(names),
        "answers": list(evidence.answers),
        "target": evidence.target,
        "logit_lens": [
            [{"token": name(t), "probability": round(p, 6)} for t, p in zip(line, values, strict=True)]
            for line, values in zip(ids.tolist(), likely.tolist(), strict=True)
        ],
        "attention_last_to_patches": rounded(evidence.maps.maps[0]),
        "attribution": {
            "heads": rounded(evidence.shares.heads[0, 0]),
            "parts": evidence.shares.shares(),
            "sum": float(evidence.shares.total[0, 0]),
            "logit": float(evidence.shares.logit[0, 0]),
            "residual": evidence.shares.residual,
        },
        "patching": {
            "clean": float(evidence.heads.clean[0]),
            "corrupted": float(evidence.heads.corrupted[0]),
            "heads": rounded(evidence.heads.effect[0]),
            "patch_layers": list(evidence.patches.layers),
            "patches": rounded(evidence.patch_effect),
        },
    }
