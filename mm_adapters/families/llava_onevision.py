"""LLaVA-OneVision: LLaVA on the image and on its tiles, which are scaled down if many (arXiv 2408.03326)."""

from mm_adapters._registry import register
from mm_adapters._spec import Anyres, Mounts
from mm_adapters.families.llava import TOWERS

register(
    Mounts(
        "llava_onevision",
        "vlm",
        ("transformers:LlavaOnevisionForConditionalGeneration",),
        TOWERS,
        image_token="image_token_id",
        images=Anyres(),
    )
)
