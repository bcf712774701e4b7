"""The size of a pipeline's pictures: what it draws as asked, and what it would round or leave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_adapters._errors import InputError
from mm_adapters.inputs.call_names import parameters_of
from mm_adapters.inputs.numbers import check_whole

SIZES = ("height", "width")


def check_size(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Raises: InputError for a height or width that the pipeline would round, or that is none."""
    step = size_step(pipeline)
    for name in SIZES:
        if arguments.get(name) is None:
            continue
        size = check_whole(name, arguments[name])
        if size % step and not _rounds_back(pipeline, arguments):
            near = sorted({max(size - size % step, step), size - size % step + step})
            raise InputError(
                f"{name}={size}: {type(pipeline).__name__} draws multiples of {step} pixels and would draw "
                f"another size. Pass {' or '.join(map(str, near))}."
            )


def both_sizes(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, int]:
    """The side that was left out, where one was given: some pipelines leave out both if one is missing.

    Empty if both or none were given, or the other one follows from a picture.
    """
    takes = parameters_of(type(pipeline).__call__)
    missing = [name for name in SIZES if arguments.get(name) is None]
    if (
        len(missing) != 1
        or not {*SIZES} <= takes.keys()
        or any("image" in n and n in arguments for n in takes)
    ):
        return {}
    if takes[missing[0]].default is not None:
        return {}
    sides = _default_sides(pipeline)
    return {} if sides is None else {missing[0]: sides[SIZES.index(missing[0])]}


def size_step(pipeline: Any) -> int:
    """What a picture's sides are multiples of, in pixels; 1 where nothing says it."""
    config = getattr(getattr(pipeline, "image_processor", None), "config", None)
    step = getattr(config, "vae_scale_factor", None)
    levels = getattr(getattr(getattr(pipeline, "movq", None), "config", None), "block_out_channels", None)
    if levels is not None:
        # Kandinsky's latents are as many times smaller again than those of its autoencoder, and rounded up.
        return (2 ** (len(levels) - 1)) ** 2
    return int(step or 1)


def _default_sides(pipeline: Any) -> tuple[int, int] | None:
    scale, sides = getattr(pipeline, "vae_scale_factor", None), getattr(pipeline, "default_sample_size", None)
    if sides is None:
        denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        sides = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if not isinstance(scale, int) or sides is None:
        return None
    height, width = (sides, sides) if isinstance(sides, int) else sides
    return int(height) * scale, int(width) * scale


def _rounds_back(pipeline: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether pictures are drawn in a size that is near, and resized to what was asked."""
    binning = parameters_of(type(pipeline).__call__).get("use_resolution_binning")
    return binning is not None and bool(arguments.get("use_resolution_binning", binning.default))
