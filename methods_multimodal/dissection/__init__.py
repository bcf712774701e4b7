"""Which concept each unit detects, in any tower, at any site."""

from methods_multimodal.dissection.concepts import Concepts, presence, read_concepts, shares
from methods_multimodal.dissection.describe import Description, asking, describe, drawing, retrieving
from methods_multimodal.dissection.falcon import Group, falcon
from methods_multimodal.dissection.naming import ClipDissection, clip_dissect, collect, embed_concepts
from methods_multimodal.dissection.network import NetworkDissection, network_dissection
from methods_multimodal.dissection.neurons import Multimodal, Selectivity, multimodal_neurons, selectivity
from methods_multimodal.dissection.scores import Chance, Faithfulness, agreement, chance, faithfulness
from methods_multimodal.dissection.shuffled_weights import twins_of, with_shuffled_weights
from methods_multimodal.dissection.units import Units

__all__ = [
    "Chance",
    "ClipDissection",
    "Concepts",
    "Description",
    "Faithfulness",
    "Group",
    "Multimodal",
    "NetworkDissection",
    "Selectivity",
    "Units",
    "agreement",
    "asking",
    "chance",
    "clip_dissect",
    "collect",
    "describe",
    "drawing",
    "embed_concepts",
    "faithfulness",
    "falcon",
    "multimodal_neurons",
    "network_dissection",
    "presence",
    "read_concepts",
    "retrieving",
    "selectivity",
    "shares",
    "twins_of",
    "with_shuffled_weights",
]
