"""LLaVA-OneVision: LLaVA on the image and on its tiles, which are scaled down if many (arXiv 2408.03326)."""

from mm_adapters._registry import register
from mm_adapters._spec import Anyres
from mm_adapters.families._parts import vlm
from mm_adapters.families.llava import TOWERS

register(vlm("llava_onevision", "LlavaOnevisionForConditionalGeneration", towers=TOWERS, images=Anyres()))
