"""`mm-interp report`: what the methods of this package say about a model and an input, as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from methods_multimodal.commands.options import (
    PROMPT,
    Device,
    ModelName,
    Picture,
    Seed,
    Steps,
    Work,
    check_images,
    check_out,
    check_work,
    names_of,
    open_model,
    two_images,
    write_report,
)
from mm_adapters import InputError, Model

_DEFAULT_TEXTS = ("a red circle", "a blue square")
_DEFAULT_QUESTION = "what colour is the circle?"
# Pictures that ship with the package and answer to the defaults above.
_DEFAULT_IMAGES = ("red_circle", "blue_square")
_DEFAULT_PAIR = ("red_circle_left_of_blue_square", "blue_circle_left_of_red_square")


def report(
    model: ModelName = "tiny-clip",
    image: Annotated[
        list[Path] | None, typer.Option(help="An image; a second one to compare it with.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="For models like CLIP: texts, the first two compared.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="For models like LLaVA.")] = None,
    prompt: Annotated[str | None, typer.Option(help="For models like Stable Diffusion.")] = None,
    seed: Seed = 0,
    steps: Steps = 25,
    device: Device = None,
    work: Work = None,
    out: Picture = Path("report.png"),
) -> None:
    """Writes one picture with numbers: what a model does with an input, and which parts do it.

    With texts: attention, logit attribution and patching. With a question: logit lens, patching and
    attention. With a prompt: the denoising steps and where the words attend.
    """
    options = {"--image": image, "--text": text, "--question": question, "--prompt": prompt}
    check_images(image or [])
    check_out(out)
    check_work(work)
    loaded = open_model(model, device)
    if loaded.kind not in _KINDS:
        raise InputError(
            f"{model} is one tower alone, and a report takes a whole model ({', '.join(_KINDS)}). "
            f"Its sites: mm-interp sites {model}"
        )
    takes, make = _KINDS[loaded.kind]
    wrong = [name for name, value in options.items() if value and name not in takes]
    if wrong:
        raise InputError(
            f"{model} is {_NAMES[loaded.kind]}: it takes {' and '.join(takes)}, not {', '.join(wrong)}."
        )
    written = make(
        loaded,
        model,
        images=image or [],
        texts=text or [],
        question=question,
        prompt=prompt,
        seed=seed,
        steps=steps,
        work=work,
    )
    write_report(written, out)


def _contrastive(
    model: Model, model_name: str, *, images: list[Path], texts: list[str], work: Path | None, **_: Any
) -> Any:
    from methods_multimodal.report import contrastive_report

    pair = two_images(images, _DEFAULT_IMAGES)
    return contrastive_report(
        model, pair, texts or list(_DEFAULT_TEXTS), names_of(pair), model_name=model_name, folder=work
    )


def _vlm(
    model: Model, model_name: str, *, images: list[Path], question: str | None, work: Path | None, **_: Any
) -> Any:
    from methods_multimodal.report import vlm_report

    pair = two_images(images, _DEFAULT_PAIR)
    return vlm_report(
        model, pair, question or _DEFAULT_QUESTION, names_of(pair), model_name=model_name, folder=work
    )


def _diffusion(
    model: Model, model_name: str, *, prompt: str | None, seed: int, steps: int, work: Path | None, **_: Any
) -> Any:
    from methods_multimodal.report import diffusion_report

    return diffusion_report(
        model, prompt or PROMPT, seed=seed, steps=steps, model_name=model_name, folder=work
    )


_KINDS = {
    "contrastive": (("--image", "--text"), _contrastive),
    "vlm": (("--image", "--question"), _vlm),
    "diffusion": (("--prompt",), _diffusion),
}
_NAMES = {
    "contrastive": "a model of images and texts",
    "vlm": "a model that answers questions about images",
    "diffusion": "a model that draws",
}
