"""Where the model looks, and what of it matters."""

from methods_multimodal.relevance.attention_maps import HeadMaps, head_maps

__all__ = [
    "HeadMaps",
    "head_maps",
]
