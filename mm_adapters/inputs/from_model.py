"""A model's `Inputs`: read from its signature, its configuration, and what was found beside it."""

from __future__ import annotations

import inspect
from typing import Any

from mm_adapters.inputs.padding import counts_padding
from mm_adapters.inputs.prepare import Inputs
from mm_adapters.inputs.readable import readable
from mm_adapters.records.spec import ModelRecord
from mm_adapters.sites.prompt_encoders import prompt_encoders
from mm_adapters.sites.site_map import SiteMap
from mm_adapters.sites.tower_view import TowerView


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
        return _pipeline_inputs(model, tokenizer, sites.model_record)
    takes = frozenset(inspect.signature(model.forward).parameters)
    prompt, token = sites.model_record.prompt, getattr(processor, "image_token", None)
    reads = readable(model, sites, tokenizer)
    return Inputs(
        kind,
        processor=processor,
        tokenizer=tokenizer,
        image_processor=image_processor,
        context=reads.context,
        image_token=None if token is None or prompt is None else str(token),
        image_prompt=None if token is None or prompt is None else prompt.format(image_token=token),
        processor_places_images=prompt is None,
        text_key=reads.text_key,
        image_key=reads.image_key,
        accepts=takes,
        pad_to_context=_reads_last_position(sites),
        counts_padding=counts_padding(model, sites),
        reads=reads,
    )


def own_tokenizer(pipeline: Any, tower: TowerView | None) -> Any:
    """What a pipeline makes a text encoder's tokens with, or None: tokenizer_2 for text_encoder_2."""
    part = "" if tower is None else tower.path.partition(".")[0]
    return (
        getattr(pipeline, part.replace("text_encoder", "tokenizer"), None) if "text_encoder" in part else None
    )


def _pipeline_inputs(pipeline: Any, tokenizer: Any, record: ModelRecord) -> Inputs:
    encoders = prompt_encoders(pipeline, record)
    takes = frozenset(inspect.signature(pipeline.__call__).parameters)
    return Inputs(
        "diffusion",
        tokenizer=tokenizer or (encoders[0].tokenizer if encoders else None),
        image_processor=getattr(pipeline, "image_processor", None),
        text_key="prompt",
        image_key=_first(takes, "image"),
        accepts=takes,
        pipeline=pipeline,
        record=record,
    )


def _first(takes: frozenset[str], *names: str) -> str:
    return next((name for name in names if name in takes), "")


def _reads_last_position(sites: SiteMap) -> bool:
    """Whether a text tower without a causal mask is read at its last position, as SigLIP's is.

    Its texts must then fill the context, or the position read would be another for each length.
    """
    text = sites.towers.get("text")
    return text is not None and text.pool == "last" and not text.record.causal
