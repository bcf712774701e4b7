"""A page that says, in words and pictures, what each head of a model adds to its embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from methods_multimodal.core.files import write_json, write_text
from methods_multimodal.report._html import inline, render
from methods_multimodal.report._page import rounded
from methods_multimodal.text_explanations.head_effects import HeadEffects
from methods_multimodal.text_explanations.name_heads import LEVEL, MANY_UNREAD, HeadNames


def unread_note(record: HeadNames) -> str | None:
    """What to say of a vocabulary in which are words that the model cannot read; None if it reads all."""
    if not record.unread:
        return None
    examples = ", ".join(repr(record.texts[i]) for i in record.unread[:4])
    share = len(record.unread) / len(record.texts)
    said = (
        f"The model embeds {len(record.unread)} of {len(record.texts)} texts as it does random letters "
        f"({examples}{', ...' if len(record.unread) > 4 else ''}): it does not read their words. "
    )
    if share > MANY_UNREAD:
        return said + "Names from this vocabulary say little; use words that the model was trained on."
    return said + "Names made of these are marked; do not rely on them."


def heads_page(
    record: HeadNames,
    picture_of: Callable[[int], Image.Image],
    model_name: str,
    effects: HeadEffects | None = None,
) -> str:
    """The page as HTML, with its pictures in it: nothing else is loaded.

    `effects` are of the same model and texts; with them the page sets what a head does in the running
    model beside what it adds itself.
    """
    unread = set(record.unread)
    files = dict(record.top_files)
    thumbs: dict[int, str] = {}

    def image(number: int, score: float) -> dict[str, str]:
        if number not in thumbs:
            thumbs[number] = _inline(picture_of(number))
        return {"number": str(number), "tip": f"{Path(files[number]).name}: {score:+z.4f}"}

    def texts(layer: int, head: int) -> list[dict[str, Any]]:
        return [
            {
                "text": record.texts[number],
                "group": record.groups[number],
                "unread": number in unread,
                "gained": float(record.variance_explained[layer, head, i]),
                "images": [
                    image(int(n), float(score))
                    for n, score in zip(
                        record.top_images[layer, head, i], record.scores[layer, head, i], strict=True
                    )
                ],
            }
            for i, number in enumerate(record.chosen[layer, head].tolist())
            if number >= 0
        ]

    n_layers, n_heads = record.chosen.shape[:2]
    layers = [
        {
            "number": layer,
            "heads": [
                {
                    "number": head,
                    "share": float(record.variance[layer, head]),
                    "texts": texts(layer, head),
                    "named": record.is_named(layer, head),
                    "p": float(record.p_value[layer, head]),
                    "null": float(record.null_share[layer, head]),
                    "effects": None if effects is None else _effects(effects, layer, head),
                }
                for head in range(n_heads)
            ],
        }
        for layer in reversed(range(n_layers))
    ]
    return render(
        "heads.html",
        title=f"What the heads of {model_name} say",
        n_images=record.n_images,
        n_texts=len(record.texts),
        layers=layers,
        thumbs=thumbs,
        unreadable=record.unreadable,
        unread=unread_note(record),
        n_named=int((record.p_value <= LEVEL).sum()),
        n_heads=record.p_value.numel(),
        n_expected=LEVEL * record.p_value.numel(),
        level=LEVEL,
        n_effects=None if effects is None else effects.n_images,
    )


def _effects(effects: HeadEffects, layer: int, head: int) -> dict[str, Any]:
    return {
        "direct": effects.text(layer, head, "direct"),
        "total": effects.text(layer, head, "total"),
        "correlation": float(effects.correlation[layer, head]),
        "size": float(effects.size[layer, head]),
        "is_direct": effects.is_direct(layer, head),
    }


def heads_numbers(record: HeadNames, model_name: str, effects: HeadEffects | None = None) -> dict[str, Any]:
    """The same as plain data."""
    files = dict(record.top_files)
    heads = []
    for layer in range(record.chosen.shape[0]):
        for head in range(record.chosen.shape[1]):
            texts = [
                {
                    "text": record.texts[number],
                    "group": record.groups[number],
                    "variance_explained": rounded(record.variance_explained[layer, head, i], 5),
                    "images": [files[n] for n in record.top_images[layer, head, i].tolist()],
                    "scores": rounded(record.scores[layer, head, i]),
                }
                for i, number in enumerate(record.chosen[layer, head].tolist())
                if number >= 0
            ]
            share = rounded(record.variance[layer, head])
            row = {"layer": layer, "head": head, "variance": share, "texts": texts}
            row |= {
                "named": record.is_named(layer, head),
                "p_value": rounded(record.p_value[layer, head], 5),
                "null_share": rounded(record.null_share[layer, head], 5),
            }
            if effects is not None:
                row["effects"] = _effects(effects, layer, head)
            heads.append(row)
    unreadable = [{"image": name, "reason": why} for name, why in record.unreadable]
    return {
        "model": model_name,
        "path": "direct",
        "images": record.n_images,
        "unreadable": unreadable,
        "unread_texts": [record.texts[i] for i in record.unread],
        "heads": heads,
    }


def write_heads(
    record: HeadNames,
    picture_of: Callable[[int], Image.Image],
    model_name: str,
    folder: Path,
    effects: HeadEffects | None = None,
) -> tuple[Path, Path]:
    """Writes heads.html and heads.json into `folder`; returns both."""
    page, numbers = folder / "heads.html", folder / "heads.json"
    write_text(page, heads_page(record, picture_of, model_name, effects))
    write_json(numbers, heads_numbers(record, model_name, effects))
    return page, numbers


def _inline(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((96, 96))
    return inline(lambda out: small.save(out, "PNG"))
