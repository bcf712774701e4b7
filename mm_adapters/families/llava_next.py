"""LLaVA-NeXT: LLaVA on the image and on its tiles (llava-vl.github.io/blog/2024-01-30-llava-next)."""

from mm_adapters._registry import register
from mm_adapters._spec import Anyres, Mounts
from mm_adapters.families.llava import TOWERS

register(
    Mounts(
        "llava_next",
        "vlm",
        ("transformers:LlavaNextForConditionalGeneration",),
        TOWERS,
        image_token="image_token_id",
        images=Anyres(),
    )
)
