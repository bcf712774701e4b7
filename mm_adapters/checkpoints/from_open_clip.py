"""open_clip's models, by architecture and weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_adapters._errors import CheckpointError
from mm_adapters.checkpoints.checks import check_safetensors
from mm_adapters.inputs.call_names import parameters_of, unknown_name


def load_open_clip(name: str, **options: Any) -> tuple[Any, Any, Any]:
    """(model, tokenizer, image transform) of "ARCH/PRETRAINED", in float32 on the CPU.

    PRETRAINED is a tag that open_clip lists or the path of a safetensors file. Pickled weights are
    never read.

    Raises: CheckpointError if there is no such architecture, tag or file, or it cannot be read.
    """
    import open_clip

    arch, _, pretrained = name.partition("/")
    _check_architecture(arch, open_clip.list_models())
    _check_options(options, open_clip.create_model_and_transforms, open_clip.create_model, open_clip.CLIP)
    if not pretrained:
        raise CheckpointError(
            f'"open_clip:{arch}" says no weights. Write open_clip:{arch}/TAG with one of '
            f"{', '.join(open_clip.list_pretrained_tags_by_model(arch)) or 'no tag'}, or the path of a "
            "safetensors file; for random weights wrap open_clip.create_model(...)."
        )
    tag = open_clip.get_pretrained_cfg(arch, pretrained)
    if tag:
        _fetch_safetensors(pretrained, tag, options.get("cache_dir"))
        # Without it open_clip builds the tag's model with another activation, and only warns.
        options.setdefault("force_quick_gelu", bool(tag.get("quick_gelu")))
    else:
        _check_file(arch, pretrained, open_clip.list_pretrained_tags_by_model(arch))
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            arch, pretrained=pretrained, device="cpu", **options
        )
    except RuntimeError as error:  # As load_state_dict reports weights that do not fit.
        raise CheckpointError(f"The weights at {pretrained} are not of open_clip's {arch}: {error}") from None
    return model, open_clip.get_tokenizer(arch), transform


def _check_architecture(arch: str, known: list[str]) -> None:
    if arch not in known:
        near = difflib.get_close_matches(arch, known, n=4, cutoff=0.3)
        raise CheckpointError(
            f"open_clip has no architecture {arch!r}. The nearest are {', '.join(near)}. "
            "Write open_clip:ARCH/PRETRAINED."
        )


def _check_options(options: Mapping[str, Any], *functions: Any) -> None:
    """Raises: InputError for an option that neither open_clip's factory nor its model takes."""
    known = {name for function in functions for name in parameters_of(function)}
    known -= {"model_name", "pretrained", "device"}
    if unknown := [name for name in options if name not in known]:
        raise unknown_name("Loading open_clip's model does not take", unknown, sorted(known))


def _check_file(arch: str, pretrained: str, tags: list[str]) -> None:
    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise CheckpointError(
            f"open_clip's {arch} has no weights {pretrained!r}, which is no file either. "
            f"Its tags: {', '.join(tags) or 'none'}."
        )
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is pickled, which can run code as it is read, so it is not. If you trust it, "
            "convert it once: safetensors.torch.save_file(state_dict, new_path)."
        )
    check_safetensors(path)


def _fetch_safetensors(tag: str, config: dict[str, Any], cache_dir: str | None) -> None:
    """Puts the tag's safetensors file in the cache, where open_clip looks before any pickled one."""
    from huggingface_hub import errors, hf_hub_download
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME

    folder, _, filename = config.get("hf_hub", "").rpartition("/")
    filename = filename.rpartition(".")[0] + ".safetensors" if filename else HF_SAFE_WEIGHTS_NAME
    if not folder:
        raise CheckpointError(
            f"open_clip gives the weights {tag!r} only as a pickled file, which is not read. Convert "
            "it to safetensors and pass its path."
        )
    try:
        hf_hub_download(folder, filename, cache_dir=cache_dir)
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(f"{folder} is not in the cache and the hub cannot be reached.") from None
    except (errors.EntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"The hub gave no {filename} of {folder} for open_clip's {tag!r}: {error}"
        ) from None
