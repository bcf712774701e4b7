"""A page that says, in words and pictures, what each head of a model adds to its embeddings."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from methods_multimodal.core.files import write_json, write_text
from methods_multimodal.report._html import inline
from methods_multimodal.report._page import rounded
from methods_multimodal.text_explanations.name_heads import HeadNames

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;
color:#1a1a1a;background:#fff}
h1{font-size:1.5rem} h2{font-size:1.1rem;margin:2rem 0 .5rem} p.note{color:#555;max-width:50rem}
table{border-collapse:collapse;width:100%} 
td,th{border-top:1px solid #ddd;padding:.5rem;vertical-align:top;text-align:left}
th{white-space:nowrap} .text{display:inline-block;vertical-align:top;margin:0 1.2rem .6rem 0;width:19rem}
.text b{font-weight:600} .text span{color:#555;font-size:.85rem}
img{width:64px;height:64px;object-fit:cover;
margin:.25rem .25rem 0 0;border:1px solid #ccc;image-rendering:auto}
.bar{height:6px;background:#e4e4e4;width:8rem}
.bar i{display:block;height:6px;background:#2166ac} code{background:#f3f3f3;padding:0 .25rem}
"""


def heads_page(found: HeadNames, picture_of: Callable[[int], Image.Image], model_name: str) -> str:
    """The page as HTML, with its pictures in it: nothing else is loaded."""
    files = dict(found.top_files)
    thumbs: dict[int, str] = {}

    def picture(number: int, score: float) -> str:
        if number not in thumbs:
            thumbs[number] = _inline(picture_of(number))
        tip = html.escape(f"{Path(files[number]).name}: {score:+z.4f}")
        return f'<img src="{thumbs[number]}" alt="{tip}" title="{tip}">'

    body = []
    n_layers, n_heads = found.chosen.shape[:2]
    for layer in reversed(range(n_layers)):
        rows = "".join(_row(found, layer, head, picture) for head in range(n_heads))
        body.append(f'<h2 id="layer{layer}">Layer {layer}</h2><table>{rows}</table>')
    skipped = "".join(f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in found.unreadable)
    skipped = f"<h2>Images that could not be read</h2><ul>{skipped}</ul>" if skipped else ""
    title = f"What the heads of {html.escape(model_name)} say"
    head = f'<meta charset="utf-8"><title>{title}</title><meta name="viewport" content="width=device-width">'
    note = (
        f"From {found.n_images} images and {len(found.texts)} texts. Each head adds a vector to an image's "
        "embedding. The texts are those along which that vector varies most, chosen one after the other "
        "(TextSpan); the percentage is how much of its variance they explain together. Below each are the "
        "images furthest along it. The bar is the head's own variance beside that of the whole embedding."
    )
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body><h1>{title}</h1>'
        f'<p class="note">{note}</p>{"".join(body)}{skipped}</body></html>\n'
    )


def heads_numbers(found: HeadNames, model_name: str) -> dict[str, Any]:
    """The same as plain data."""
    files = dict(found.top_files)
    heads = []
    for layer in range(found.chosen.shape[0]):
        for head in range(found.chosen.shape[1]):
            texts = [
                {
                    "text": found.texts[number],
                    "group": found.groups[number],
                    "variance_explained": rounded(found.variance_explained[layer, head, i], 5),
                    "images": [files[n] for n in found.top_images[layer, head, i].tolist()],
                    "scores": rounded(found.scores[layer, head, i]),
                }
                for i, number in enumerate(found.chosen[layer, head].tolist())
                if number >= 0
            ]
            share = rounded(found.variance[layer, head])
            heads.append({"layer": layer, "head": head, "variance": share, "texts": texts})
    unreadable = [{"image": name, "reason": why} for name, why in found.unreadable]
    return {"model": model_name, "images": found.n_images, "unreadable": unreadable, "heads": heads}


def write_heads(
    found: HeadNames, picture_of: Callable[[int], Image.Image], model_name: str, folder: Path
) -> tuple[Path, Path]:
    """Writes heads.html and heads.json into `folder`; returns both."""
    page, numbers = folder / "heads.html", folder / "heads.json"
    write_text(page, heads_page(found, picture_of, model_name))
    write_json(numbers, heads_numbers(found, model_name))
    return page, numbers


def _row(found: HeadNames, layer: int, head: int, picture: Callable[[int, float], str]) -> str:
    cells = []
    for i, number in enumerate(found.chosen[layer, head].tolist()):
        if number < 0:
            continue
        places = found.top_images[layer, head, i].tolist()
        scores = found.scores[layer, head, i].tolist()
        images = "".join(picture(n, s) for n, s in zip(places, scores, strict=True))
        gained = float(found.variance_explained[layer, head, i])
        text, group = html.escape(found.texts[number]), html.escape(found.groups[number])
        cells.append(f'<div class="text"><b>{text}</b> <span>{group} {gained:.0%}</span><br>{images}</div>')
    share = float(found.variance[layer, head])
    bar = f'<div class="bar"><i style="width:{min(share, 1):.1%}"></i></div>'
    said = "".join(cells) or "It does not vary along any of the texts."
    return f"<tr><th>head {layer}.{head}<br>{bar}<small>{share:.2%}</small></th><td>{said}</td></tr>"


def _inline(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((96, 96))
    return inline(lambda out: small.save(out, "PNG"))
