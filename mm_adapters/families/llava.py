"""LLaVA: a vision tower, a projector, a language tower (arXiv 2304.08485)."""

from mm_adapters.families._parts import language, vlm
from mm_adapters.records import Input, Output, Tower, TowerMount, register

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
    "vision": TowerMount("model.vision_tower"),
    "projector": TowerMount("model.multi_modal_projector"),
    "language": LANGUAGE,
}
register(vlm("llava", "LlavaForConditionalGeneration", towers=TOWERS))
