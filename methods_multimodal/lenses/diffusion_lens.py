"""What a text encoder knew after each layer, drawn by the pipeline itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.diffusion.pictures import check_pictures, pictures_of
from methods_multimodal.lenses._entries import layer_names, stream_sites
from methods_multimodal.lenses.reading import LensReading
from mm_adapters import Edit, InputError, MissingSiteError, Model

# Takes pictures, gives a score of each for each candidate.
Judge = Callable[[Float[Tensor, "picture 3 height width"]], Float[Tensor, "picture candidate"]]


@dataclass(frozen=True)
class LayerPictures(Record):
    """What each prompt's states after each layer draw, in 0..1; the last layer is the pipeline's own picture.

    The first is of the embeddings, before any block.
    """

    pictures: Float[Tensor, "prompt layer 3 height width"]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    layers: tuple[str, ...]

    def judged(self, judge: Judge, candidates: Sequence[str], unit: str = "score") -> LensReading:
        """Scores of every picture for each candidate, as a reading whose positions are the prompts.

        Raises: InputError if the judge gives another number of scores.
        """
        flat = rearrange(self.pictures, "prompt layer c h w -> (prompt layer) c h w")
        scores = judge(flat).detach().float()
        if scores.shape != (len(flat), len(candidates)):
            raise InputError(
                f"The judge gave scores of shape {tuple(scores.shape)} for {len(flat)} pictures and "
                f"{len(candidates)} candidates."
            )
        n = len(self.prompts)
        return LensReading(
            scores=rearrange(scores, "(prompt layer) c -> prompt layer c", prompt=n),
            total=None,
            lens="diffusion",
            unit=unit,
            layers=self.layers,
            candidates=tuple(candidates),
            rows=tuple(range(n)),
            positions=(0,) * n,
            where="the whole prompt",
        )


def diffusion_lens(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    tower: str = "text",
    options: Mapping[str, Any] | None = None,
) -> LayerPictures:
    """Draws each prompt from the text encoder's states after each layer: later blocks write nothing.

    The states go through the encoder's own final norm and the whole pipeline; what guides against
    (the negative prompt) is encoded by all layers. Pictures of one prompt begin with the same noise. There is
    one run of the pipeline for each layer.

    Args:
        model: A text-to-image pipeline.
        prompts: What is drawn.
        seeds: Of each prompt's noise.
        tower: The text encoder's name; others of the pipeline stay as they are.
        options: More of the pipeline's arguments: `num_inference_steps`, `guidance_scale`, `height`, ...

    Source: Toker et al. 2024, arXiv 2403.05846.
    Raises: MissingSiteError if the pipeline makes no pictures or has no such encoder with one stream;
    InputError without prompts, without a seed for each, or if options say what these arguments say.
    """
    check_pictures(model)
    view = model.check_tower(tower)
    if view.role not in ("text", "language"):
        raise MissingSiteError(f"{model.name}: no tower {tower!r} reads prompts: it is a {view.role} tower.")
    stream_sites(model, view)
    blocks = [f"{tower}.blocks.{i}.hook_resid_post" for i in range(view.n_layers())]
    for site in blocks:
        model.check_site(site)
    if not prompts or len(prompts) != len(seeds):
        raise InputError(f"{len(prompts)} prompts and {len(seeds)} seeds: give a seed for each.")
    taken = sorted(set(options or {}) & {"prompt", "seed", "num_images_per_prompt", "output_type"})
    if taken:
        raise InputError(f"The options hold {', '.join(taken)}, which prompts and seeds say here.")
    inputs = {
        **(options or {}),
        "prompt": list(prompts),
        "seed": [int(s) for s in seeds],
        "output_type": "pt",
    }
    pictures = []
    for layer in range(-1, len(blocks)):
        edits = _stopping_after(layer, f"{tower}.blocks.0.hook_resid_pre", blocks)
        pictures.append(pictures_of(model, model.run(inputs, edit=edits).output).detach().float().cpu())
    return LayerPictures(
        pictures=torch.stack(pictures, 1),
        prompts=tuple(prompts),
        seeds=tuple(int(s) for s in seeds),
        layers=layer_names(len(blocks) + 1),
    )


def _stopping_after(layer: int, first: str, blocks: Sequence[str]) -> list[Edit]:
    """Edits with which every later block gives what this one gave; none for the last."""
    later = blocks[layer + 1 :]
    if not later:
        return []
    held: dict[str, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        held["state"] = value.clone()
        return value

    def give(value: Tensor) -> Tensor:
        return held["state"].to(value)

    at = first if layer < 0 else blocks[layer]
    return [Edit(at, keep, rows="cond"), *(Edit(site, give, rows="cond") for site in later)]
