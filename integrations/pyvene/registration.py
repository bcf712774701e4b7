"""pyvene's tables of where things are and how wide, written from the family records."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from pyvene.models import intervenable_modelcard as card
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK
from torch import nn

from integrations.pyvene._pipeline import ModelLike, host
from mm_adapters import Site, SiteMap
from mm_adapters.records import Input, Output

_HOOKS = {Input: CONST_INPUT_HOOK, Output: CONST_OUTPUT_HOOK}


def register(model: ModelLike) -> dict[str, str]:
    """Tells pyvene where this model's sites are; returns component -> reason for those it cannot reach.

    A component is a site's name with %s for the layer, "vision.blocks.%s.hook_resid_post", which a
    representation's `layer` fills. What is a module's input or output is registered; what this
    package computes inside a module (normalised values, scores, patterns) pyvene has no hook for.
    `model` is an `mm.Model`, or the module or pipeline that it wraps. Calling it twice changes nothing.
    """
    wrapped = getattr(model, "wrapped", model)
    sites = SiteMap(wrapped)
    target = host(model)
    modules, dimensions, missing = {}, {}, {}
    for site in sites:
        name, path = component_of(site), _path(site)
        location = site.location
        if not isinstance(location, Input | Output) or location.chunk is not None:
            missing[name] = "pyvene reads what a module is given or returns; this is computed inside one"
            continue
        if path is None:
            missing[name] = "its module is not part of the model that pyvene is given"
            continue
        entry: tuple[Any, ...] = (path, _HOOKS[type(location)])
        width = width_of(site, wrapped)
        if site.n_heads is not None:
            entry = (*entry, (card.split_head_and_permute, site.n_heads))
            width = None if width is None else width // site.n_heads
        # Blocks of one stack may lie under several paths: then each layer is a component of its own.
        if "%s" not in path or (name in modules and modules[name][0] != path):
            name = site.name
        modules[name] = entry
        dimensions[name] = (str(width),) if width is not None else ()
    kind = type(target)
    card.type_to_module_mapping[kind] = card.type_to_module_mapping.get(kind, {}) | modules
    card.type_to_dimension_mapping[kind] = card.type_to_dimension_mapping.get(kind, {}) | {
        k: v for k, v in dimensions.items() if v
    }
    return missing


def component_of(site: Site) -> str:
    """The site's name with %s for its layer."""
    if site.layer is None:
        return site.name
    return f"{site.tower}.{site.stack}.%s.{site.part}"


def _path(site: Site) -> str | None:
    """The module's path as pyvene writes it: with [i] for lists, and %s for the layer."""
    parts = site.module.split(".")
    out = ""
    for part in parts:
        out += f"[{part}]" if part.isdigit() else f".{part}" if out else part
    if site.layer is not None and out.count("[") == 1 and f"[{site.layer}]" in out:
        before, _, after = out.partition("[")
        return f"{before}[%s]{after.partition(']')[2]}"
    return out or None


def width_of(site: Site, wrapped: Any) -> int | None:
    """The size of the site's last axis (of a map, its channels), from the weights beside it."""
    location = site.location
    module = attrgetter(site.module)(wrapped) if site.module else wrapped
    side = "out" if isinstance(location, Output) else "in"
    order = (f"{side}_features", f"{side}_channels", "embedding_dim", "embed_dim", "hidden_size")
    for name in order:
        if isinstance(value := vars(module).get(name), int):
            return value
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    # A block, an attention, an MLP: as wide as the stream its parts read.
    inner = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if isinstance(location, Output) and inner:
        last = inner[-1]
        return last.out_features if isinstance(last, nn.Linear) else last.out_channels
    if inner:
        first = inner[0]
        return first.in_features if isinstance(first, nn.Linear) else first.in_channels
    return None
