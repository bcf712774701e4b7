"""Cross-attention: where words are attended to, what they change, and how to control them."""

from methods_multimodal.cross_attention.agreement import baseline_agreement, rank_agreement
from methods_multimodal.cross_attention.attribution import Attribution, attribute_patching
from methods_multimodal.cross_attention.binding import bind_attributes, binding_loss
from methods_multimodal.cross_attention.cases import Case, Part, grid, step_groups
from methods_multimodal.cross_attention.changes import WordChanges, word_changes
from methods_multimodal.cross_attention.control import LocalBlend, WordEdit, edit_words
from methods_multimodal.cross_attention.effects import Effects, Interval, correlation
from methods_multimodal.cross_attention.metrics import by_rule, clip_contrast, clip_score, colour
from methods_multimodal.cross_attention.neurons import (
    Memorisation,
    NeuronStatistics,
    find_neurons,
    memorisation_score,
    neuron_statistics,
)
from methods_multimodal.cross_attention.part_effects import PartEffects, effects_of_parts
from methods_multimodal.cross_attention.restoring import restore_layers, restore_text
from methods_multimodal.cross_attention.segmentation import (
    Segmentation,
    average_precision,
    iou,
    masks,
    segment,
)
from methods_multimodal.cross_attention.tracing import ablate_heads, knock_out_words, patch_words
from methods_multimodal.cross_attention.word_maps import WordReader, word_maps, word_reader
from methods_multimodal.cross_attention.word_maps_record import WordMaps

__all__ = [
    "Attribution",
    "Case",
    "Effects",
    "Interval",
    "LocalBlend",
    "Memorisation",
    "NeuronStatistics",
    "Part",
    "PartEffects",
    "Segmentation",
    "WordChanges",
    "WordEdit",
    "WordMaps",
    "WordReader",
    "ablate_heads",
    "attribute_patching",
    "average_precision",
    "baseline_agreement",
    "bind_attributes",
    "binding_loss",
    "by_rule",
    "clip_contrast",
    "clip_score",
    "colour",
    "correlation",
    "edit_words",
    "effects_of_parts",
    "find_neurons",
    "grid",
    "iou",
    "knock_out_words",
    "masks",
    "memorisation_score",
    "neuron_statistics",
    "patch_words",
    "rank_agreement",
    "restore_layers",
    "restore_text",
    "segment",
    "step_groups",
    "word_changes",
    "word_maps",
    "word_reader",
]
