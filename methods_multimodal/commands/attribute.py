"""`mm-interp attribute`: which training pictures made a diffusion model draw this."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from methods_multimodal.commands.options import (
    Device,
    ModelName,
    Picture,
    Seed,
    SkipUnreadable,
    Steps,
    check_folder,
    check_out,
    open_model,
)
from mm_adapters import InputError
from mm_adapters.inputs.images import to_rgb

_METHODS = (
    "d-trak", "trak", "journey-trak", "dot", "cosine", "datainf", "ekfac", "unlearning", "clip", "pixels",
)  # fmt: skip


def attribute(
    query: Annotated[str, typer.Option(help="A prompt: what the model draws of it is asked about.")],
    train: Annotated[
        str, typer.Option(help="A folder of pictures with captions, or zoo:N for tiny-sd's first N.")
    ],
    model: ModelName = "tiny-sd",
    method: Annotated[str, typer.Option(help=f"One of {', '.join(_METHODS)}.")] = "d-trak",
    image: Annotated[Path | None, typer.Option(help="Ask about this picture instead of drawing one.")] = None,
    parameters: Annotated[
        str, typer.Option(help="Differentiated: all, cross_attention_kv, lora, or a pattern of names.")
    ] = "all",
    timesteps: Annotated[int, typer.Option(min=1, help="Over which gradients are averaged.")] = 10,
    width: Annotated[int, typer.Option(min=1, help="Of the projected gradients.")] = 1024,
    damping: Annotated[float, typer.Option(min=0, help="In shares of the kernel's mean eigenvalue.")] = 0.1,
    judge: Annotated[str, typer.Option(help="For clip: whose features.")] = "tiny-clip",
    seed: Seed = 0,
    steps: Steps = 25,
    shown: Annotated[int, typer.Option(min=1, help="How many pictures of each kind.")] = 6,
    skip_unreadable: SkipUnreadable = False,
    device: Device = None,
    work: Annotated[
        Path, typer.Option(help="A folder for gradient features, which the next query uses again.")
    ] = Path("attribution"),
    out: Picture = Path("attribution.png"),
) -> None:
    """Draws a picture and ranks training pictures by how much they helped or harmed it.

    A run that was killed goes on where it was when it is called again.
    """
    from methods_multimodal.data_attribution.pictures import read_pictures

    if method not in _METHODS:
        raise InputError(f"There is no method {method!r}; there is {', '.join(_METHODS)}.")
    check_out(out)
    if image is not None and not image.is_file():
        raise FileNotFoundError(f"There is no image {image}.")
    journey = method == "journey-trak"
    if journey and (image is not None or steps < 2):
        raise InputError("journey-trak follows a drawing of at least two --steps: it takes no --image.")
    asked_about: Any = None if image is None else to_rgb(image)
    pictures = read_pictures(train, skip_unreadable=skip_unreadable)
    for name, why in pictures.unreadable:
        typer.echo(f"skipped {name}: {why}")
    check_folder(work, "--work")
    from torchvision.transforms.functional import to_pil_image

    from methods_multimodal.core.files import write_json
    from methods_multimodal.core.generators import generator
    from methods_multimodal.data_attribution.encoding import diffusion_examples
    from methods_multimodal.data_attribution.journey import trajectory
    from methods_multimodal.plots.data_attribution import sources
    from mm_adapters.store import atomic_write

    why = "does not draw; attribute is about diffusion models."
    loaded = open_model(model, device, kind="diffusion", otherwise=why)
    pipe: Any = loaded.wrapped
    side = _side(loaded)
    known = pictures.images(side)
    traced = None
    if journey:
        traced = trajectory(loaded, [query], n_own=timesteps, n_steps=steps, seed=seed)
        drawn = to_pil_image(traced.pictures[0])
    elif image is None:
        drawn = pipe(query, num_inference_steps=steps, generator=generator(seed)).images[0]
    else:
        drawn = asked_about.resize((side, side))
    if method in ("clip", "pixels"):
        scored = _alike([drawn], known, open_model(judge, device) if method == "clip" else None)
    else:
        examples = diffusion_examples(loaded, known, list(pictures.captions))
        asked = diffusion_examples(loaded, [drawn], [query])
        scored = _by_gradients(
            method,
            loaded,
            traced,
            examples,
            asked,
            work,
            parameters=parameters,
            timesteps=timesteps,
            width=width,
            damping=damping,
        )
    scores = scored[0]
    figure = sources(
        drawn, scores, known.__getitem__, title=f"{query}\n({method})", captions=pictures.captions, n=shown
    )
    with atomic_write(out, keep_suffix=True) as part:
        figure.savefig(part, dpi=120)
    ranked = scores.argsort(descending=True).tolist()
    numbers = out.with_suffix(".json")
    settings = {"parameters": parameters, "timesteps": timesteps, "width": width, "damping": damping}
    write_json(
        numbers,
        {
            "model": model,
            "query": query,
            "method": method,
            "train": train,
            "seed": seed,
            **settings,
            "scores": [
                {
                    "number": i,
                    "name": pictures.names[i],
                    "caption": pictures.captions[i],
                    "score": float(scores[i]),
                }
                for i in ranked
            ],
        },
    )
    for i in ranked[:shown]:
        typer.echo(f"{float(scores[i]):+z.3g}  {pictures.names[i]}: {pictures.captions[i]}")
    typer.echo(f"wrote {out} and {numbers}")


def _by_gradients(
    method: str,
    model: Any,
    traced: Any,
    examples: dict[str, Any],
    asked: dict[str, Any],
    work: Path,
    *,
    parameters: str,
    timesteps: int,
    width: int,
    damping: float,
) -> Any:
    import torch

    from methods_multimodal.data_attribution.diffusion import diffusion_task
    from methods_multimodal.data_attribution.features import featurise, query_features
    from methods_multimodal.data_attribution.journey import journey_trak
    from methods_multimodal.data_attribution.kronecker import kronecker_scores
    from methods_multimodal.data_attribution.projection import Projection
    from methods_multimodal.data_attribution.scorers import Cosine, DataInf, Dot, scores
    from methods_multimodal.data_attribution.trak import Trak
    from methods_multimodal.data_attribution.unlearning import unlearning_scores

    measure = "output_norm" if method == "d-trak" else "loss"
    task = diffusion_task(model, measure=measure, timesteps=timesteps, noise="one", parameters=parameters)
    asked["index"] = torch.zeros(1, dtype=torch.long)
    if method == "ekfac":
        return kronecker_scores(task, examples, asked, work / f"ekfac-{_digest(examples, asked)}")
    if method == "unlearning":
        return unlearning_scores(
            task, examples, asked, damping=damping, folder=work / f"unlearning-{_digest(examples, asked)}"
        )
    projection = Projection("sparse", width)
    store = featurise(task, examples, work / f"{measure}-{_digest(examples)}", projection=projection)
    if traced is not None:
        return journey_trak(
            model, store, traced, scorer=Trak(damping=damping), parameters=parameters
        ).scores()
    features = query_features(task, asked, projection=projection)
    scorers = {
        "d-trak": Trak(measure=measure, damping=damping),
        "trak": Trak(measure=measure, damping=damping),
        "dot": Dot(measure=measure),
        "cosine": Cosine(measure=measure),
        "datainf": DataInf(damping, measure=measure),
    }
    return scores(scorers[method], store, features)


def _alike(queries: list[Any], known: Any, judge: Any) -> Any:
    import torch
    from torchvision.transforms.functional import to_tensor

    from methods_multimodal.data_attribution.retrieval import image_features, pixel_features, similarity

    sides = [torch.stack([to_tensor(picture) for picture in part]) for part in (queries, known)]
    features = [pixel_features(s) if judge is None else image_features(judge, s) for s in sides]
    return similarity(*features)


def _side(model: Any) -> int:
    """The side in pixels of the pictures a pipeline draws."""
    from methods_multimodal.data_attribution.diffusion import denoiser_of

    config: Any = denoiser_of(model).config
    size = config.sample_size
    return (size if isinstance(size, int) else size[0]) * getattr(model.wrapped, "vae_scale_factor", 1)


def _digest(*parts: dict[str, Any]) -> str:
    """A few letters for these examples: a folder of their own."""
    hashed = hashlib.sha256()
    for part in parts:
        for name in sorted(part):
            hashed.update(name.encode() + part[name].detach().float().numpy().tobytes())
    return hashed.hexdigest()[:10]
