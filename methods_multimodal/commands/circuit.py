"""`mm-interp circuit`: which nodes carry the difference between images and their twins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from methods_multimodal.commands.options import (
    Device,
    ModelName,
    Picture,
    check_out,
    open_model,
    write_report,
)
from mm_adapters import InputError, Model

_SAMPLES = ("red_circle_left_of_blue_square", "blue_circle_left_of_red_square")
_QUESTION = "what colour is the circle?"


def circuit(
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image; give the option once for each. None: a sample picture and its twin."),
    ] = None,
    twin: Annotated[
        list[Path] | None, typer.Option(help="Its twin, which differs in one thing; in the same order.")
    ] = None,
    answer: Annotated[
        list[str] | None, typer.Option(help="What is true of each image: an answer, or a text.")
    ] = None,
    other: Annotated[list[str] | None, typer.Option(help="What is true of its twin.")] = None,
    question: Annotated[
        str, typer.Option(help="What a vision-language model is asked about all of them.")
    ] = "",
    model: ModelName = "tiny-llava",
    exact: Annotated[
        bool, typer.Option("--exact", help="Patch every node, not gradients along a path.")
    ] = False,
    edges: Annotated[bool, typer.Option("--edges", help="Draw the largest edges, too.")] = False,
    mib: Annotated[Path | None, typer.Option(help="The edges as JSON for MIB's tools.")] = None,
    device: Device = None,
    out: Picture = Path("circuit.png"),
) -> None:
    """Which heads, MLPs and inputs carry the difference between images and twins, across towers.

    With four pairs or more the circuit is chosen on the first half and judged on the second; with fewer it is
    judged on the pairs that it was chosen on, and the page says so.
    """
    check_out(out)
    given = {"--image": image, "--twin": twin, "--answer": answer, "--other": other}
    if len({len(values or ()) for values in given.values()}) > 1:
        counts = ", ".join(f"{len(values or ())} {name}" for name, values in given.items())
        raise InputError(f"{counts}: give one of each for every pair.")
    loaded = open_model(model, device)
    images, twins, answers, others = (image or [], twin or [], answer or [], other or [])
    if not images:
        images, twins, answers, others = _sample(loaded)
        question = question or _QUESTION
    if loaded.kind not in ("vlm", "contrastive") or (loaded.kind == "vlm" and not question):
        raise InputError(
            f"{model}: give a vision-language model and --question, or a contrastive model. For prompts of a "
            "text-to-image model use circuits.score_nodes, or mm-interp trace."
        )
    made = [
        _pair(loaded, a, b, question, x, y) for a, b, x, y in zip(images, twins, answers, others, strict=True)
    ]
    from methods_multimodal.report.circuit import circuit_report

    page = circuit_report(loaded, made, model_name=model, exact=exact, edges=edges, mib=mib)
    write_report(page, out)


def _sample(model: Model) -> tuple[list[Path], list[Path], list[str], list[str]]:
    """The sample pictures of two objects with colours exchanged, and what is true of each."""
    from mm_adapters.zoo import sample_images

    pictures = sample_images()
    said = ("red", "blue")
    if model.kind == "contrastive":
        said = ("a red circle left of a blue square", "a blue circle left of a red square")
    return [pictures[_SAMPLES[0]]], [pictures[_SAMPLES[1]]], [said[0]], [said[1]]


def _pair(model: Model, image: Path, twin: Path, question: str, answer: str, other: str) -> Any:
    from PIL import Image

    from methods_multimodal.circuits import Pairs
    from methods_multimodal.core.outputs import contrast_of, vocabulary_logits

    pictures = [Image.open(path).convert("RGB") for path in (image, twin)]
    if model.kind == "contrastive":
        texts = [answer, other]
        inputs = [model.prepare(text=texts, images=[picture]) for picture in pictures]

        def of_texts(output: Any) -> Tensor:
            logits = contrast_of(output).logits
            return logits[:, 0] - logits[:, 1]

        return Pairs(inputs[0], inputs[1], of_texts)
    tokenizer: Callable[..., Any] = model.tokenizer_of("language")
    tokens = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"][0] for text in (answer, other)]
    if tokens[0] == tokens[1]:
        raise InputError(f"{answer!r} and {other!r} begin with the same token, so no logit tells them apart.")
    prompt = f"<image>\nquestion: {question} answer:"
    inputs = [model.prepare(text=[prompt], images=[picture]) for picture in pictures]
    last = int(model.row_positions(inputs[0])[0])

    def of_tokens(output: Any) -> Tensor:
        logits = vocabulary_logits(model, output)[:, last]
        return logits[:, tokens[0]] - logits[:, tokens[1]]

    return Pairs(inputs[0], inputs[1], of_tokens)
