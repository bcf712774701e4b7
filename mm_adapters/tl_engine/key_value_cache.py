"""TransformerLens' key-value cache given to a model of transformers, and filled by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mm_adapters._errors import InputError
from mm_adapters.inputs.cache_argument import cache_name
from mm_adapters.inputs.call_names import CallNames
from mm_adapters.sites.tower_view import TowerView


@contextmanager
def key_value_cache(
    cache: Any, names: CallNames, mounted: TowerView, new: Tensor | None
) -> Iterator[dict[str, Any]]:
    """The arguments of a call that goes on from a cache; afterwards the cache has the new keys and values.

    A frozen cache stays as it is. `new` is the mask of the new positions, [batch, new].

    Raises: InputError if the tower keeps no keys and values, or the cache is of another shape.
    """
    has_encoder = any("cross_attn.hook_z" in parts for parts in mounted.parts.get("blocks", ()))
    name = cache_name(names.takes)
    if has_encoder or name is None:
        raise InputError(
            f"The {mounted.name} tower takes no past_kv_cache: "
            "it does not keep keys and values of its own positions alone."
        )
    if not (hasattr(cache, "entries") and hasattr(cache, "append_attention_mask")):
        raise InputError(
            f"past_kv_cache is a {type(cache).__name__}: pass TransformerLensKeyValueCache.init_cache(...), "
            "or the model's own cache as past_key_values=."
        )
    if len(cache.entries) != mounted.n_layers():
        raise InputError(
            f"past_kv_cache has {len(cache.entries)} layers; the {mounted.name} tower has "
            f"{mounted.n_layers()}."
        )
    assert new is not None
    n_rows = len(new)
    held = cache.entries[0].past_keys
    if len(held) != n_rows:
        raise InputError(f"past_kv_cache is of {len(held)} rows, and {n_rows} were given.")
    from transformers import DynamicCache

    past = DynamicCache()
    for layer, entry in enumerate(cache.entries):
        if entry.past_keys.shape[1]:
            keys, values = (rearrange(t, "b p h d -> b h p d") for t in (entry.past_keys, entry.past_values))
            past.update(keys, values, layer)
    mask = torch.cat([cache.previous_attention_mask.to(new), new], -1)
    yield {name: past, "use_cache": True, "attention_mask": mask}
    if cache.frozen:
        return
    cache.append_attention_mask(new)
    layers: list[Any] = past.layers
    for entry, layer in zip(cache.entries, layers, strict=False):  # A run may stop before the last.
        entry.past_keys = rearrange(layer.keys, "b h p d -> b p h d")
        entry.past_values = rearrange(layer.values, "b h p d -> b p h d")
