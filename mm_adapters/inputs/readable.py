"""What a model reads, from its configuration and its tables: what prepared tensors are checked against."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_adapters.inputs.prepared import Readable
from mm_adapters.records.image_tokens import ImageTokens, Queries, Square
from mm_adapters.sites.site_map import SiteMap
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.sites.weights import tensor_at


def readable(model: Any, sites: SiteMap, tokenizer: Any = None) -> Readable:
    """What the arguments of this module (no pipeline) can be."""
    text, vision = _taker(sites, "text", "language"), _taker(sites, "vision")
    return Readable(
        text_key="" if text is None else text.input_name,
        image_key="" if vision is None else vision.input_name,
        context=_context(model, tokenizer),
        n_tokens=None if text is None else partial(_vocabulary, text),
        placeholders=_placeholders(getattr(model, "config", None)),
        image_size=_image_size(model, sites),
        n_channels=_n_channels(model),
        image_id=_image_id(model, sites),
        images=_image_tokens(sites, vision),
        n_class=vision.record.n_class if vision is not None and isinstance(vision.record.n_class, int) else 0,
        videos=sites.model_record.videos,
        video_id=_id_at(model, sites.model_record.video_token),
        config=getattr(model, "config", None),
        feeds=tuple(dict.fromkeys(t.input_name for t in sites.towers.values() if t.input_name)),
    )


def _taker(sites: SiteMap, *roles: str) -> TowerView | None:
    """The first tower of one of these roles."""
    return next((tower for tower in sites.towers.values() if tower.role in roles), None)


def _vocabulary(tower: TowerView) -> int | None:
    """How many tokens its table has now."""
    table = tensor_at(tower.module, tower.record.embed) if tower.record.embed else None
    return None if table is None or table.ndim != 2 else table.shape[0]


def _placeholders(config: Any) -> frozenset[int]:
    """Ids that stand for what is put in their place, and may lie outside the table."""
    named = vars(config) if config is not None else {}
    ids = (v for k, v in named.items() if k.endswith(("_token_id", "_token_index")))
    return frozenset(i for i in ids if isinstance(i, int))


def _image_id(model: Any, sites: SiteMap) -> int | None:
    record = sites.model_record
    marked = isinstance(record.images, Queries) and record.images.mask is not None
    if record.kind != "vlm" or marked or record.image_token is None:
        return None
    return _id_at(model, record.image_token)


def _id_at(model: Any, name: str | None) -> int | None:
    value = None if name is None else getattr(getattr(model, "config", None), name, None)
    return value if isinstance(value, int) else None


def _image_tokens(sites: SiteMap, vision: TowerView | None) -> ImageTokens | None:
    record = sites.model_record
    own = record.images or (None if vision is None else vision.record.images)
    return Square() if own is None and record.image_token is not None else own


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
        size = _timm_size(getattr(model, "timm_model", model))
    if size is None or isinstance(size, Mapping):
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _timm_size(model: Any) -> Any:
    """What timm's patches check a picture against; None if they take others."""
    patches = getattr(model, "patch_embed", None)
    if not getattr(patches, "strict_img_size", False) or getattr(patches, "dynamic_img_pad", False):
        return None
    return None if getattr(model, "dynamic_img_size", False) else getattr(patches, "img_size", None)


def _n_channels(model: Any) -> int | None:
    n_channels = getattr(_vision_config(model), "num_channels", None)
    return 3 if n_channels is None and hasattr(model, "visual") else n_channels


def _vision_config(model: Any) -> Any:
    config = getattr(model, "config", None)
    return getattr(config, "vision_config", config)
