"""Cross-attention: see, trace and control which words draw which pixels."""

from methods_multimodal.cross_attention.segmentation import (
    Segmentation,
    average_precision,
    iou,
    masks,
    segment,
)
from methods_multimodal.cross_attention.word_maps import WordMaps, WordReader, word_maps, word_reader

__all__ = [
    "Segmentation",
    "WordMaps",
    "WordReader",
    "average_precision",
    "iou",
    "masks",
    "segment",
    "word_maps",
    "word_reader",
]
