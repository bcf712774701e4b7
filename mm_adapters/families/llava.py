"""LLaVA: a vision tower, a projector, a language tower (arXiv 2304.08485)."""

from mm_adapters._registry import register
from mm_adapters._spec import Input, Mount, Output, Tower
from mm_adapters.families._parts import language, vlm

register(
    Tower(
        "llava_projector",
        "projector",
        tuple(f"transformers:{c}MultiModalProjector" for c in ("Llava", "LlavaNext", "LlavaOnevision")),
        {},
        before={"hook_in": Input(""), "hook_pre": Output("linear_1"), "hook_post": Input("linear_2")},
        after={"hook_out": Output("")},
        norm=None,
        takes="image_features",
        gives="",
        pool="none",
    )
)
LANGUAGE = language("model.language_model")
TOWERS = {
    "vision": Mount("model.vision_tower"),
    "projector": Mount("model.multi_modal_projector"),
    "language": LANGUAGE,
}
register(vlm("llava", "LlavaForConditionalGeneration", towers=TOWERS))
