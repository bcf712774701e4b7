"""The page of a lens: what a model says, or draws, if it stops after each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from methods_multimodal.core.embed import embed_texts
from methods_multimodal.diffusion.pictures import to_array
from methods_multimodal.lenses import clip_lens, diffusion_lens, logit_lens
from methods_multimodal.plots import lens_candidates, lens_maps, lens_sheet, lens_table, picture
from methods_multimodal.report._page import Report, as_seen, new_page, rounded
from methods_multimodal.report.vlm import name_of, prompt_of
from mm_adapters import InputError, MissingSiteError, Model
from mm_adapters.inputs.images import to_rgb
from mm_adapters.zoo import sample_images

TEXTS = ("a red circle", "a blue square", "a green star")
_SAMPLE = "red_circle_left_of_blue_square"


def lens_report(
    model: Model,
    *,
    image: Any = None,
    question: str = "what colour is the circle?",
    texts: Sequence[str] | None = None,
    prompt: str = "",
    final_norm: bool = True,
    seed: int = 0,
    steps: int = 20,
    model_name: str = "",
    **options: Any,
) -> Report:
    """The lens that suits a model, on one input.

    Args:
        model: One that answers, one like CLIP, or a pipeline that draws from a prompt.
        image: A picture; without, one that ships with the package.
        question: What is asked of a model that answers.
        texts: Candidates: words, whose first token counts, or texts of a model like CLIP. Without, the
            likeliest words of the last layer, or three texts of the zoo's world.
        prompt: What a pipeline draws.
        final_norm: Whether states go through the final norm, of a model that answers.
        seed: Of a pipeline's noise.
        steps: A pipeline's steps.
        model_name: What the model is called on the page.
        options: More of the pipeline's arguments.

    Raises: as `logit_lens`, `clip_lens` and `diffusion_lens`; InputError for one tower alone.
    """
    name = model_name or model.name
    if model.kind == "vlm":
        return _answered(model, image, question, texts, final_norm, name)
    if model.kind == "contrastive":
        return _compared(model, image, list(texts or TEXTS), name)
    if model.kind == "diffusion":
        return _drawn(model, prompt, seed, {"num_inference_steps": steps, **options}, name)
    raise InputError(f"{name} is one tower alone, and a lens' page takes a whole model.")


def _answered(
    model: Model, image: Any, question: str, texts: Sequence[str] | None, final_norm: bool, name: str
) -> Report:
    tokenizer = model.tokenizer_of("language")
    if tokenizer is None:
        raise InputError(f"{name} came without a tokenizer, so its tokens have no words.")
    picture_given = sample_images()[_SAMPLE] if image is None else image
    inputs = model.prepare(text=[prompt_of(model, question)], images=[[picture_given]])
    last = logit_lens(model, inputs, final_norm=final_norm)
    tokens = [_first_token(tokenizer, text) for text in texts or ()] or last.top(2)[1][-1].tolist()
    maps = None
    try:
        maps = logit_lens(model, inputs, final_norm=final_norm, position="image", tokens=tokens)
    except MissingSiteError as error:  # Of a decoder that looks at the image by cross-attention.
        note = str(error)
    else:
        note = "" if maps.grid is not None else "the image comes in tiles, so there are no maps of it"
        maps = maps if maps.grid is not None else None
    word = name_of(model)
    pixels = np.asarray(to_rgb(picture_given))
    if maps is None:
        figure = new_page(9.0, 5.0, f"{name}: “{question}”")
        lens_table(last, word, figure.add_subplot())
    else:
        figure = lens_sheet(last, maps, range(len(tokens)), pixels, word, caption=question)
        figure.suptitle(f"{name}: “{question}”", fontsize=13)
    best, ids = last.top(5)
    numbers = {
        "model": name,
        "question": question,
        "lens": last.lens,
        "layers": list(last.layers),
        "top": [
            [{"token": word(t), "probability": round(p, 6)} for t, p in zip(line, values, strict=True)]
            for line, values in zip(ids.tolist(), best.tolist(), strict=True)
        ],
        "own_gap": last.own_gap,
        "candidates": [word(t) for t in tokens],
        "maps": None if maps is None else rounded(maps.probabilities),
    }
    lines = [
        f"{layer}: {word(int(i))!r} {float(p):.2f}"
        for layer, i, p in zip(last.layers, ids[:, 0], best[:, 0], strict=True)
    ]
    if last.own_gap is not None:
        lines.append(f"the last layer is {last.own_gap:.1e} from the model's own logits at most")
    return Report(figure, numbers, tuple([*lines, note] if note else lines))


def _compared(model: Model, image: Any, texts: list[str], name: str) -> Report:
    inputs = model.prepare(images=[sample_images()[_SAMPLE] if image is None else image])
    directions = embed_texts(model, texts)
    whole = clip_lens(model, inputs, directions, names=texts)
    patches = clip_lens(model, inputs, directions, patches=True, names=texts)
    page = new_page(12.0, 4.4 + 2.3 * len(texts), f"{name}: layers in the joint space")
    grid = page.add_gridspec(1 + len(texts), 3, height_ratios=[4.4, *[2.3] * len(texts)])
    pixels = inputs[model.check_tower("vision").input_name]
    picture(as_seen(model, pixels[0]), page.add_subplot(grid[0, 0]), title="as the model sees it")
    lens_candidates(whole, page.add_subplot(grid[0, 1:]))
    for i in range(len(texts)):
        lens_maps(patches, i, page.add_subplot(grid[i + 1, :]))
    nearest = whole.scores[0].argmax(-1).tolist()
    numbers = {
        "model": name,
        "texts": texts,
        "layers": list(whole.layers),
        "cosines": rounded(whole.scores[0]),
        "own_gap": whole.own_gap,
        "patches": rounded(patches.scores),
    }
    lines = [
        f"{layer}: {texts[i]!r} {float(whole.scores[0, j, i]):+z.3f}"
        for j, (layer, i) in enumerate(zip(whole.layers, nearest, strict=True))
    ]
    return Report(page, numbers, tuple(lines))


def _drawn(model: Model, prompt: str, seed: int, options: dict[str, Any], name: str) -> Report:
    found = diffusion_lens(model, [prompt], [seed], options=options)
    n = len(found.layers)
    page = new_page(2.4 * n, 3.2, f"{name}: “{prompt}”, from its text encoder's states after each layer")
    grid = page.add_gridspec(1, n)
    for i, layer in enumerate(found.layers):
        picture(to_array(found.pictures[0, i]), page.add_subplot(grid[0, i]), title=layer)
    away = (found.pictures[0] - found.pictures[0, -1]).abs().mean((-1, -2, -3))
    numbers = {
        "model": name,
        "prompt": prompt,
        "seed": seed,
        "layers": list(found.layers),
        "mean change of a pixel from the last": rounded(away),
    }
    lines = [
        f"{layer}: pixels {float(x):.3f} from the pipeline's own picture on average"
        for layer, x in zip(found.layers, away, strict=True)
    ]
    return Report(page, numbers, tuple(lines))


def _first_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer(f" {text.strip()}", add_special_tokens=False).input_ids
    if not ids:
        raise InputError(f"{text!r} has no token.")
    return int(ids[0])
