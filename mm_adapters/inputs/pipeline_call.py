"""A pipeline's own options: refused before anything runs where they mean nothing, or contradict."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from mm_adapters._errors import InputError
from mm_adapters.inputs.call_names import SEED, parameters_of
from mm_adapters.inputs.numbers import check_between, check_finite, check_seed, check_whole
from mm_adapters.inputs.picture_size import SIZES, both_sizes, check_size
from mm_adapters.inputs.prompts import is_prompt
from mm_adapters.inputs.step_share import check_strength

_COUNTS = ("num_images_per_prompt", "num_images", "batch_size", "callback_steps", "max_sequence_length")
_PICTURES = ("image", "mask_image", "control_image")
# The arguments that tell how many pictures are made, the first that is given.
_ROWS_OF = ("prompt", "prompt_embeds", "class_labels", "image_embeds", "batch_size")
_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds", "image_embeds", "image")
_CALLBACKS = ("callback", "prior_callback")
_ANY_SIZE = 1024  # Stands for a size that the pipeline chooses, where its own checks ask for one.


def check_options(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Passes if each option can be meant; whether they are enough for a run is `check_run`'s.

    Raises: InputError for a seed beside a generator or that is none, steps, counts or sizes that are no
    positive whole numbers, a size that would be rounded, numbers that are NaN.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if SEED in given:
        check_seed(given[SEED])
        if "generator" in given:
            raise InputError("seed= and generator= were both given, and one would be left out. Pass one.")
    takes = parameters_of(type(pipeline).__call__)
    for name in arguments.keys() - given.keys():
        if name in takes and _is_number(takes[name].default):
            raise InputError(
                f"{name}=None, and it is a number. Leave it out for the pipeline's {takes[name].default}."
            )
    for name, value in given.items():
        if name.endswith("inference_steps") or name in _COUNTS:
            check_whole(name, value)
        elif name == "class_labels":
            labels = (
                value if isinstance(value, list | tuple) else [] if isinstance(value, Tensor) else [value]
            )
            for i, label in enumerate(labels):
                check_whole(f"class_labels[{i}]", label, least=0)
        elif name == "clip_skip":
            check_whole(name, value, least=0)
        elif name in ("strength", "denoising_start"):
            check_between(name, value, 0, 1)
        elif name == "denoising_end":
            check_between(name, value, 0, 1, above=True)
        elif name in takes and (_is_number(takes[name].default) or name.endswith("scale")):
            if isinstance(value, list | tuple) and not name.startswith(
                "control"
            ):  # One for each control net.
                raise InputError(f"{name}={value!r} is a list. Pass one number.")
            check_finite(name, value)
        elif name in _PICTURES and not _is_picture(value):
            raise InputError(
                f"{name}={value!r} is {type(value).__name__}. Pass a picture (PIL.Image.open of a file), "
                "or images=."
            )
        elif name in ("timesteps", "sigmas"):
            _check_schedule(pipeline, name, value)
        elif name.endswith("_kwargs") and not isinstance(value, Mapping):
            raise InputError(f"{name}={value!r} is {type(value).__name__}. Pass a dictionary.")
        elif name in _TENSORS and not _is_finite(value):
            raise InputError(f"{name} has values that are NaN or infinite. Replace them.")
        elif name.startswith(_CALLBACKS) and not name.endswith("inputs") and not callable(value):
            raise InputError(f"{name}={value!r} is {type(value).__name__}. Pass a function.")
    check_size(pipeline, given)


def check_output(outputs: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Raises: InputError if `output_type` is none of those that a pipeline knows."""
    output = arguments.get("output_type")
    if output is not None and output not in outputs:
        raise InputError(f"output_type={output!r}; there is {', '.join(outputs)}.")


def _check_schedule(pipeline: Any, name: str, value: Any) -> None:
    if not isinstance(value, list | tuple | Tensor | np.ndarray) or not len(value):
        raise InputError(f"{name}={value!r}: pass a list of numbers, one a step.")
    for i, one in enumerate(value):
        check_finite(f"{name}[{i}]", one)
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is not None and name not in inspect.signature(scheduler.set_timesteps).parameters:
        raise InputError(
            f"{type(scheduler).__name__} takes no {name} of your own. Pass num_inference_steps, or give "
            "the pipeline "
            "another scheduler."
        )


def settled(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with what the pipeline would otherwise not do as asked said in full.

    A height alone gets its width, which some pipelines else leave out together; a negative prompt that
    is one text is repeated for each prompt.
    """
    out = {**arguments, **both_sizes(pipeline, arguments)}
    prompt = out.get("prompt")
    if isinstance(prompt, list | tuple):
        for name, value in arguments.items():
            if name.startswith("negative_prompt") and is_prompt(name) and isinstance(value, str):
                out[name] = [value] * len(prompt)
    return out


def check_run(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Passes if a run with these arguments can begin: the pipeline's own checks, before its first module.

    Raises: InputError with the pipeline's reason; for negative prompts or seeds that are not one a prompt.
    """
    check_options(pipeline, arguments)
    _check_pictures(pipeline, arguments)
    n_prompts, pictures = _n_prompts(arguments), n_pictures(arguments)
    if n_prompts is not None and pictures is not None:
        for name, value in arguments.items():
            if is_prompt(name) and isinstance(value, list | tuple) and len(value) != n_prompts:
                raise InputError(
                    f"There are {len(value)} texts in {name} and {n_prompts} in prompt. Pass one for each, "
                    "or one text."
                )
        _check_latents(pipeline, arguments.get("latents"), pictures)
        for name in (SEED, "generator"):
            seeds = arguments.get(name)
            if isinstance(seeds, list | tuple) and len(seeds) != pictures:
                raise InputError(
                    f"There are {len(seeds)} in {name} for {pictures} pictures. Pass one for each, or "
                    "one alone."
                )
    check_strength(pipeline, arguments)
    _check_inputs(pipeline, arguments)


def _check_pictures(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    takes = parameters_of(type(pipeline).__call__)
    if "strength" not in takes and getattr(pipeline, "controlnet", None) is None:
        return
    for name in _PICTURES:
        if name in takes and arguments.get(name) is None:
            raise InputError(f"{type(pipeline).__name__} draws from a picture. Pass {name}=.")


def _check_latents(pipeline: Any, latents: Any, n_pictures: int) -> None:
    if latents is None:
        return
    if not isinstance(latents, Tensor):
        raise InputError(f"latents={latents!r:.80} is {type(latents).__name__}. Pass a tensor of noise.")
    channels = getattr(getattr(getattr(pipeline, "vae", None), "config", None), "latent_channels", None)
    others = latents.ndim == 4 and channels not in (None, latents.shape[1])
    if latents.ndim < 2 or latents.shape[0] != n_pictures or others:
        raise InputError(
            f"latents are {list(latents.shape)} for {n_pictures} pictures of {channels or 'some'} "
            "channels. Pass "
            "[picture, channel, height, width]."
        )


def _check_inputs(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    check = getattr(pipeline, "check_inputs", None)
    if check is None:
        return
    takes = parameters_of(type(pipeline).__call__)
    bound: dict[str, Any] = {}
    for name, parameter in inspect.signature(check).parameters.items():
        default = takes[name].default if name in takes else parameter.default
        value = arguments.get(name, default)
        if value is parameter.empty:
            if name != "callback_steps":
                return  # It is worked out by the pipeline on its way.
            value = None
        bound[name] = _ANY_SIZE if value is None and name in SIZES else value
    try:
        check(**bound)
    except ValueError as error:
        reason = str(error).strip()
        raise InputError(f"{type(pipeline).__name__} cannot be called so: {reason}") from None
    except (TypeError, AttributeError, KeyError, IndexError):
        return  # Its checks ask for what it works out on its way.


def n_pictures(arguments: Mapping[str, Any]) -> int | None:
    """How many pictures a pipeline will draw; None if its arguments do not tell."""
    n = _n_prompts(arguments)
    return None if n is None else n * int(arguments.get("num_images_per_prompt") or 1)


def _n_prompts(arguments: Mapping[str, Any]) -> int | None:
    for name in _ROWS_OF:
        rows = arguments.get(name)
        if isinstance(rows, str):
            return 1
        if isinstance(rows, list | tuple) or (isinstance(rows, Tensor) and rows.ndim):
            return len(rows)
        if isinstance(rows, int):
            return rows if name == "batch_size" else 1
    return None


def _is_picture(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_picture, value))
    return isinstance(value, Image | np.ndarray | Tensor)


def _is_finite(value: Any) -> bool:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return not is_float or bool(torch.isfinite(value).all())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
