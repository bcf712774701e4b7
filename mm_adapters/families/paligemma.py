"""PaliGemma: SigLIP, one linear map, Gemma, with full attention over image and prompt (arXiv 2407.07726)."""

from mm_adapters.families._parts import projector, vlm
from mm_adapters.families.llava import TOWERS
from mm_adapters.records import register

register(projector("paligemma_projector", "PaliGemmaMultiModalProjector"))
register(vlm("paligemma", "PaliGemmaForConditionalGeneration", towers=TOWERS))
