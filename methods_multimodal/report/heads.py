"""A page that says, in words and pictures, what each head of a model adds to its embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from methods_multimodal.core.files import write_json, write_text
from methods_multimodal.report._html import inline, render
from methods_multimodal.report._page import rounded
from methods_multimodal.text_explanations.name_heads import HeadNames


def heads_page(record: HeadNames, picture_of: Callable[[int], Image.Image], model_name: str) -> str:
    """The page as HTML, with its pictures in it: nothing else is loaded."""
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
                {"number": head, "share": float(record.variance[layer, head]), "texts": texts(layer, head)}
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
    )


def heads_numbers(record: HeadNames, model_name: str) -> dict[str, Any]:
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
            heads.append({"layer": layer, "head": head, "variance": share, "texts": texts})
    unreadable = [{"image": name, "reason": why} for name, why in record.unreadable]
    return {"model": model_name, "images": record.n_images, "unreadable": unreadable, "heads": heads}


def write_heads(
    record: HeadNames, picture_of: Callable[[int], Image.Image], model_name: str, folder: Path
) -> tuple[Path, Path]:
    """Writes heads.html and heads.json into `folder`; returns both."""
    page, numbers = folder / "heads.html", folder / "heads.json"
    write_text(page, heads_page(record, picture_of, model_name))
    write_json(numbers, heads_numbers(record, model_name))
    return page, numbers


def _inline(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((96, 96))
    return inline(lambda out: small.save(out, "PNG"))
