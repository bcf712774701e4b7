"""LLaVA-NeXT: LLaVA on the image and on its tiles (llava-vl.github.io/blog/2024-01-30-llava-next)."""

from mm_adapters._registry import register
from mm_adapters._spec import Anyres
from mm_adapters.families._parts import vlm
from mm_adapters.families.llava import TOWERS

register(vlm("llava_next", "LlavaNextForConditionalGeneration", towers=TOWERS, images=Anyres()))
