"""Pixtral's tower, for images of any size, and Mistral 3, which merges patches (arXiv 2410.07073)."""

from mm_adapters.families._parts import projector, vlm
from mm_adapters.families.llava import TOWERS
from mm_adapters.records import (
    Input,
    Merged,
    Output,
    Stack,
    Tower,
    attention,
    gated_mlp,
    norm,
    pre_norm,
    register,
)

NEWLINES = ("[IMG_BREAK]", "[IMG_END]")
BLOCKS = Stack(
    ("transformer.layers.*",),
    pre_norm(ln1="attention_norm", attn="attention", heads=attention("attention", o="o_proj", rotary=True),
             ln2="ffn_norm", ff="feed_forward", neurons=gated_mlp("feed_forward"), kind="RMS"),
)  # fmt: skip

register(
    Tower(
        "pixtral_vision",
        "vision",
        ("transformers:PixtralVisionModel",),
        {"blocks": BLOCKS},
        # One row, in which the patches of all images lie end to end.
        before={"hook_embed": Output("ln_pre")},
        absent={"ln_final.*": "it ends without a norm"},
        norm="RMS",
        gives="last_hidden_state",
        pool="none",
        patch="patch_conv",
        any_size=True,
        order="end to end",
        images=Merged("image_sizes", newlines=NEWLINES),
    )
)
register(
    projector(
        "mistral3_projector",
        "Mistral3MultiModalProjector",
        inside=norm("norm", "ln", "RMS")
        | {"hook_merged": Output("patch_merger")}
        | {"hook_pre": Output("linear_1"), "hook_post": Input("linear_2")},
        packed=True,
    )
)
register(
    vlm("mistral3", "Mistral3ForConditionalGeneration", towers=TOWERS,
        images=Merged("image_sizes", merge="spatial_merge_size", newlines=NEWLINES))
)  # fmt: skip
