"""What changes when a site of one run is given the value of another's, or attention is blocked."""

from methods_multimodal.patching.activation_patching import (
    ActivationPatching,
    patch_heads,
    patch_positions,
    patch_units,
)
from methods_multimodal.patching.answers import answer_log_prob, answer_logits
from methods_multimodal.patching.attention_knockout import Cut, Knockout, knock_out
from methods_multimodal.patching.causal_tracing import CausalTrace, trace
from methods_multimodal.patching.corruption import (
    Corruption,
    averaged,
    noised,
    other_pictures,
    other_words,
    resampled,
)
from methods_multimodal.patching.head_importance import (
    HeadImportance,
    PositionImportance,
    head_importance,
    position_importance,
)
from methods_multimodal.patching.information_flow import InformationFlow, information_flow
from methods_multimodal.patching.roles import TokenRoles, register_positions, token_roles

__all__ = [
    "ActivationPatching",
    "CausalTrace",
    "Corruption",
    "Cut",
    "HeadImportance",
    "InformationFlow",
    "Knockout",
    "PositionImportance",
    "TokenRoles",
    "answer_log_prob",
    "answer_logits",
    "averaged",
    "head_importance",
    "information_flow",
    "knock_out",
    "noised",
    "other_pictures",
    "other_words",
    "patch_heads",
    "patch_positions",
    "patch_units",
    "position_importance",
    "register_positions",
    "resampled",
    "token_roles",
    "trace",
]
