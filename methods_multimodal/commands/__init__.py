"""`mm-interp report`: what the methods of this package say about a model and an input, as one picture.

The other commands of this package are registered here too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from methods_multimodal.commands.attribute import attribute
from methods_multimodal.commands.dissect import dissect
from methods_multimodal.commands.heads import heads
from methods_multimodal.commands.words import register as register_cross_attention
from mm_adapters import InputError

_FORMATS = (".png", ".pdf", ".svg", ".jpg", ".webp")
_DEFAULT_TEXTS = ("a red circle", "a blue square")
_DEFAULT_QUESTION = "what colour is the circle?"
_DEFAULT_PROMPT = "a large red circle in the middle on a white background"
# Pictures that ship with the package and answer to the defaults above.
_DEFAULT_IMAGES = ("red_circle", "blue_square")
_DEFAULT_PAIR = ("red_circle_left_of_blue_square", "blue_circle_left_of_red_square")


def register(app: typer.Typer) -> None:
    """Adds this package's commands to `mm-interp`."""
    app.command("report")(report)
    app.command("attribute")(attribute)
    app.command("dissect")(dissect)
    app.command("heads")(heads)
    register_cross_attention(app)


def report(
    model: Annotated[str, typer.Option(help="A shipped model, a folder, or an id on the hub.")] = "tiny-clip",
    image: Annotated[
        list[Path] | None, typer.Option(help="An image; a second one to compare it with.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="For models like CLIP: texts, the first two compared.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="For models like LLaVA.")] = None,
    prompt: Annotated[str | None, typer.Option(help="For models like Stable Diffusion.")] = None,
    seed: Annotated[int, typer.Option(help="Of a diffusion model's noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="A diffusion model's steps.")] = 25,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the first GPU if there is one.")] = None,
    out: Annotated[Path, typer.Option(help="The picture; its numbers go beside it, as .json.")] = Path(
        "report.png"
    ),
) -> None:
    """Writes one picture with numbers: what a model does with an input, and which parts do it.

    With texts: attention, logit attribution and patching. With a question: logit lens, patching and
    attention. With a prompt: the denoising steps and where the words attend.
    """
    given = {"--image": image, "--text": text, "--question": question, "--prompt": prompt}
    _check_before_loading(image or [], out)
    from mm_adapters.loading import load

    try:
        loaded = load(model, device=device)
    except ValueError as error:  # An unknown device.
        raise InputError(str(error)) from None
    if loaded.kind not in _KINDS:
        raise InputError(
            f"{model} is one tower alone, and a report takes a whole model ({', '.join(_KINDS)}). "
            f"Its sites: mm-interp sites {model}"
        )
    takes, make = _KINDS[loaded.kind]
    wrong = [name for name, value in given.items() if value and name not in takes]
    if wrong:
        raise InputError(
            f"{model} is {_CALLED[loaded.kind]}: it takes {' and '.join(takes)}, not {', '.join(wrong)}."
        )
    made = make(
        loaded,
        model,
        images=image or [],
        texts=text or [],
        question=question,
        prompt=prompt,
        seed=seed,
        steps=steps,
    )
    picture, numbers = made.write(out)
    for line in (*made.lines, f"wrote {picture} and {numbers}"):
        typer.echo(line)


def _contrastive(model: Any, model_name: str, *, images: list[Path], texts: list[str], **_: Any) -> Any:
    from methods_multimodal.report import contrastive_report

    chosen = _two_images(images, _DEFAULT_IMAGES)
    return contrastive_report(
        model, chosen, texts or list(_DEFAULT_TEXTS), _names(chosen), model_name=model_name
    )


def _vlm(model: Any, model_name: str, *, images: list[Path], question: str | None, **_: Any) -> Any:
    from methods_multimodal.report import vlm_report

    chosen = _two_images(images, _DEFAULT_PAIR)
    return vlm_report(model, chosen, question or _DEFAULT_QUESTION, _names(chosen), model_name=model_name)


def _diffusion(model: Any, model_name: str, *, prompt: str | None, seed: int, steps: int, **_: Any) -> Any:
    from methods_multimodal.report import diffusion_report

    return diffusion_report(model, prompt or _DEFAULT_PROMPT, seed=seed, steps=steps, model_name=model_name)


_KINDS = {
    "contrastive": (("--image", "--text"), _contrastive),
    "vlm": (("--image", "--question"), _vlm),
    "diffusion": (("--prompt",), _diffusion),
}
_CALLED = {
    "contrastive": "a model of images and texts",
    "vlm": "a model that answers questions about images",
    "diffusion": "a model that draws",
}


def _check_before_loading(images: list[Path], out: Path) -> None:
    if len(images) > 2:
        raise InputError(f"a report is about one image and one to compare it with; {len(images)} were given.")
    for path in images:
        if not path.is_file():
            raise FileNotFoundError(f"There is no image {path}.")
    if out.suffix.lower() not in _FORMATS:
        raise InputError(f"--out {out}: the picture's format is one of {', '.join(_FORMATS)}.")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.absolute().parent}.")


def _two_images(images: list[Path], defaults: tuple[str, str]) -> list[Path]:
    """The user's images; sample pictures in place of what is missing."""
    from mm_adapters.zoo import sample_images

    samples = sample_images()
    spare = (
        [samples[name] for name in reversed(defaults)] if len(images) == 1 else [samples[n] for n in defaults]
    )
    fresh = [s for s in spare if s.resolve() not in {i.resolve() for i in images}]
    return [*images, *fresh][:2]


def _names(images: list[Path]) -> list[str]:
    names = [path.name for path in images]
    return names if len(set(names)) == len(names) else [f"{i + 1}. {name}" for i, name in enumerate(names)]
