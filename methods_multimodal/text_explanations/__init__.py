"""What heads, neurons and embeddings of CLIP-like models mean, in words."""

from methods_multimodal.text_explanations.ablation import Ablation, Component, ablate, ablation
from methods_multimodal.text_explanations.components import Alignment, Ranking, align, rank_components
from methods_multimodal.text_explanations.concept_dictionary import (
    ConceptDictionary,
    concept_dictionary,
    token_states,
)
from methods_multimodal.text_explanations.decomposition import Decomposition, decompose, decompositions
from methods_multimodal.text_explanations.head_effects import HeadEffects, head_effects
from methods_multimodal.text_explanations.moments import Moments
from methods_multimodal.text_explanations.name_heads import (
    HeadNames,
    head_basis,
    head_coordinates,
    name_heads,
)
from methods_multimodal.text_explanations.readable import Readability, readability
from methods_multimodal.text_explanations.retrieval import Retrieved, retrieve
from methods_multimodal.text_explanations.second_order import (
    NeuronDirections,
    SecondOrder,
    principal_directions,
    second_order,
    text_codes,
)
from methods_multimodal.text_explanations.segmentation import (
    Segmentation,
    SegmentationScores,
    best_threshold,
    segment,
    segmentation_scores,
)
from methods_multimodal.text_explanations.splice import (
    Dictionary,
    Splice,
    dictionary,
    image_mean,
    intervene,
    splice,
)
from methods_multimodal.text_explanations.spurious import (
    Groups,
    Repair,
    find_shortcut,
    group_accuracy,
    repaired,
)
from methods_multimodal.text_explanations.text_null import rotated_shares
from methods_multimodal.text_explanations.text_span import NothingVariesError, TextSpan, text_span
from methods_multimodal.text_explanations.vocabulary import Vocabulary, attribute_templates, vocabulary

__all__ = [
    "Ablation",
    "Alignment",
    "Component",
    "ConceptDictionary",
    "Decomposition",
    "Dictionary",
    "Groups",
    "HeadEffects",
    "HeadNames",
    "Moments",
    "NeuronDirections",
    "NothingVariesError",
    "Ranking",
    "Readability",
    "Repair",
    "Retrieved",
    "SecondOrder",
    "Segmentation",
    "SegmentationScores",
    "Splice",
    "TextSpan",
    "Vocabulary",
    "ablate",
    "ablation",
    "align",
    "attribute_templates",
    "best_threshold",
    "concept_dictionary",
    "decompose",
    "decompositions",
    "dictionary",
    "find_shortcut",
    "group_accuracy",
    "head_basis",
    "head_coordinates",
    "head_effects",
    "image_mean",
    "intervene",
    "name_heads",
    "principal_directions",
    "rank_components",
    "readability",
    "repaired",
    "retrieve",
    "rotated_shares",
    "second_order",
    "segment",
    "segmentation_scores",
    "splice",
    "text_codes",
    "text_span",
    "token_states",
    "vocabulary",
]
