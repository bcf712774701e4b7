"""LLaVA-NeXT: LLaVA on the image and on its tiles (llava-vl.github.io/blog/2024-01-30-llava-next)."""

from mm_adapters.families._parts import vlm
from mm_adapters.families.llava import TOWERS
from mm_adapters.records import Anyres, register

register(vlm("llava_next", "LlavaNextForConditionalGeneration", towers=TOWERS, images=Anyres()))
