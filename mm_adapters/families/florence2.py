"""Florence-2: a DaViT, whose blocks attend among patches then among channels, and BART (arXiv 2311.06242)."""

from mm_adapters.families._parts import davit_block, vlm
from mm_adapters.records import Input, Output, Stack, Tower, TowerMount, norm, register

SKIP = "convolutions stand on the skip connection; read hook_resid_pre, hook_attn_out, hook_mlp_out"


register(
    Tower(
        "davit",
        "vision",
        ("transformers:Florence2VisionBackbone",),
        {
            # A window is a row of the batch.
            "spatial": Stack(("blocks.*.*.spatial_block",), davit_block("window_attn", "num_heads")),
            # Heads are groups of channels; queries and keys are the channels of a group.
            "channel": Stack(("blocks.*.*.channel_block",), davit_block("channel_attn", "groups")),
        },
        before={"hook_embed": Output("convs.0", is_map=True)},
        absent={
            "spatial.*.hook_resid_mid": SKIP,
            "channel.*.hook_resid_mid": SKIP,
            "blocks.*": "its blocks are of two kinds: spatial.* and channel.*",
        },
        takes="hidden_states",
        gives="",
        pool="none",
    )
)
register(
    Tower(
        "florence2_projector",
        "projector",
        ("transformers:Florence2MultiModalProjector",),
        {},
        before={"hook_in": Input("", is_map=True), "hook_projected": Output("image_projection")},
        after=norm("image_proj_norm", "ln") | {"hook_out": Output("")},
        takes="image_features",
        gives="",
        pool="none",
    )
)
register(
    vlm("florence2", "Florence2ForConditionalGeneration", towers={
        "vision": TowerMount("model.vision_tower", takes="pixel_values"),
        "projector": TowerMount("model.multi_modal_projector"),
        "text": TowerMount("model.language_model.encoder"),
        "language": TowerMount("model.language_model.decoder", takes="decoder_input_ids",
                          project="lm_head.weight.T"),
    }, prompt=None)
)  # fmt: skip
