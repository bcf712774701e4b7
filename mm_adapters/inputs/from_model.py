"""A model's `Inputs`: read from its signature, its configuration, and what was found beside it."""

from __future__ import annotations

import inspect
from typing import Any

from mm_adapters.inputs.prepare import Inputs
from mm_adapters.sites.site_map import SiteMap
from mm_adapters.sites.tower_view import TowerView

_PROMPT_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "prior_tokenizer")


def inputs_for(
    model: Any,
    *,
    processor: Any = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    sites: SiteMap | None = None,
) -> Inputs:
    """How texts and images are prepared for `model` (a module or a pipeline).

    A processor's own tokenizer and image processor serve where none is passed. `sites` are the model's, if
    they were read already.

    Raises: UnknownFamilyError if no family covers the model.
    """
    sites = SiteMap(model) if sites is None else sites
    kind = sites.model_record.kind
    if hasattr(processor, "convert_ids_to_tokens"):  # AutoProcessor may return a part alone.
        tokenizer, processor = tokenizer or processor, None
    elif processor is not None and not hasattr(processor, "tokenizer"):
        image_processor, processor = image_processor or processor, None
    tokenizer = tokenizer or getattr(processor, "tokenizer", None)
    image_processor = image_processor or getattr(processor, "image_processor", None)
    if kind == "diffusion":
        return _pipeline_inputs(model, tokenizer)
    takes = frozenset(inspect.signature(model.forward).parameters)
    prompt, token = sites.model_record.prompt, getattr(processor, "image_token", None)
    return Inputs(
        kind,
        processor=processor,
        tokenizer=tokenizer,
        image_processor=image_processor,
        context=_context(model, tokenizer),
        image_token=None if token is None or prompt is None else str(token),
        image_prompt=None if token is None or prompt is None else prompt.format(image_token=token),
        processor_places_images=prompt is None,
        text_key=_taken(sites, "text", "language"),
        image_key=_taken(sites, "vision"),
        accepts=takes,
        pad_to_context=_reads_last_position(sites),
        image_size=_image_size(model, sites),
        n_channels=_n_channels(model),
    )


def own_tokenizer(pipeline: Any, tower: TowerView | None) -> Any:
    """What a pipeline makes a text encoder's tokens with, or None: tokenizer_2 for text_encoder_2."""
    part = "" if tower is None else tower.path.partition(".")[0]
    return (
        getattr(pipeline, part.replace("text_encoder", "tokenizer"), None) if "text_encoder" in part else None
    )


def _pipeline_inputs(pipeline: Any, tokenizer: Any) -> Inputs:
    of_pipeline = [getattr(pipeline, name, None) for name in _PROMPT_TOKENIZERS]
    tokenizers = tuple(t for t in of_pipeline if t is not None) or ((tokenizer,) if tokenizer else ())
    takes = frozenset(inspect.signature(pipeline.__call__).parameters)
    return Inputs(
        "diffusion",
        tokenizer=tokenizer or (tokenizers[0] if tokenizers else None),
        image_processor=getattr(pipeline, "image_processor", None),
        text_key="prompt",
        image_key=_first(takes, "image"),
        accepts=takes,
        prompt_tokenizers=tokenizers,
    )


def _taken(sites: SiteMap, *roles: str) -> str:
    """The argument by which the first tower of one of these roles is given its input; "" if none is."""
    return next((tower.input_name for tower in sites.towers.values() if tower.role in roles), "")


def _first(takes: frozenset[str], *names: str) -> str:
    return next((name for name in names if name in takes), "")


def _context(model: Any, tokenizer: Any) -> int | None:
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    length = getattr(config, "max_position_embeddings", None)
    # open_clip's models and tokenizers say it themselves.
    length = length or getattr(model, "context_length", None)
    return length or getattr(tokenizer, "context_length", None)


def _image_size(model: Any, sites: SiteMap) -> tuple[int, int] | None:
    vision = sites.towers.get("vision")
    if vision is not None and vision.record.any_size:
        return None
    size = getattr(_vision_config(model), "image_size", None)
    if size is None:
        size = getattr(getattr(model, "visual", model), "image_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _n_channels(model: Any) -> int | None:
    n_channels = getattr(_vision_config(model), "num_channels", None)
    return 3 if n_channels is None and hasattr(model, "visual") else n_channels


def _vision_config(model: Any) -> Any:
    config = getattr(model, "config", None)
    return getattr(config, "vision_config", config)


def _reads_last_position(sites: SiteMap) -> bool:
    """Whether a text tower without a causal mask is read at its last position, as SigLIP's is.

    Its texts must then fill the context, or the position read would be another for each length.
    """
    text = sites.towers.get("text")
    return text is not None and text.pool == "last" and not text.record.causal
