"""SigLIP 2 with images of any shape (NaFlex), cut into patches beforehand (arXiv 2502.14786)."""

from dataclasses import replace

from mm_adapters.families import siglip
from mm_adapters.records import Output, norm, register

register(
    replace(
        siglip.VISION,
        name="siglip2_vision",
        classes=("transformers:Siglip2VisionModel",),
        before={"hook_patches": Output("embeddings.patch_embedding"), "hook_embed": Output("embeddings")},
        after=norm("post_layernorm", "ln_final"),
        absent={"pool.*": "the attention that pools is not read by parts"},
        patch=None,
        grids="spatial_shapes",
    )
)
register(replace(siglip.TEXT, name="siglip2_text", classes=("transformers:Siglip2TextModel",)))
register(replace(siglip.SIGLIP, name="siglip2", classes=("transformers:Siglip2Model",)))
