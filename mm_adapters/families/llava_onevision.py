"""LLaVA-OneVision: LLaVA on the image and on its tiles, which are scaled down if many (arXiv 2408.03326)."""

from mm_adapters.families._parts import vlm
from mm_adapters.families.llava import TOWERS
from mm_adapters.records import Anyres, PooledFrames, register

register(
    vlm("llava_onevision", "LlavaOnevisionForConditionalGeneration", towers=TOWERS, images=Anyres(),
        videos=PooledFrames())
)  # fmt: skip
