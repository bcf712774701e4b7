"""Gemma 3: SigLIP, patches averaged to fewer tokens, a Gemma decoder (arXiv 2503.19786)."""

from mm_adapters.families._parts import projector, vlm
from mm_adapters.families.llava import TOWERS
from mm_adapters.records import norm, register

register(
    projector(
        "gemma3_projector",
        "Gemma3MultiModalProjector",
        inside=norm("mm_soft_emb_norm", "ln", "RMS", 1.0),
    )
)
register(vlm("gemma3", "Gemma3ForConditionalGeneration", towers=TOWERS))
