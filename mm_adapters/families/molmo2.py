"""Molmo 2: an image whole, then in crops; attention pools four patches to a token (arXiv 2409.17146)."""

from functools import partial

from mm_adapters.families import llama
from mm_adapters.families._parts import decoder, vlm
from mm_adapters.families.llava import TOWERS
from mm_adapters.records import Built, Input, Output, Stack, Tower, Views, attention, mlp, pre_norm, register

_attention = partial(
    attention, o="o_proj", heads="config.num_attention_heads", kv_heads="config.num_key_value_heads"
)
register(
    Tower(
        "molmo2_vision",
        "vision",
        ("transformers:Molmo2VisionModel",),
        {"blocks": Stack(("layers.*",), pre_norm(
            ln1="layer_norm1", attn="self_attn", heads=_attention("self_attn"),
            ln2="layer_norm2", ff="mlp", neurons=mlp("mlp")))},
        before={"hook_embed": Input("layers.0")},
        absent={"hook_pos_embed": "the position table is added without a module; see W_pos",
                "ln_final.*": "it ends with its last block"},
        pool="mean",
        position="positional_embedding",
        any_size=True,  # Images come cut into patches.
    )
)  # fmt: skip
_TOKEN, _NEURON = ("token", "d_model"), ("token", "d_mlp")
register(
    Tower(
        "molmo2_adapter",
        "projector",
        ("transformers:Molmo2Adapter",),
        {},
        # The mean of a token's patches attends to them; here a row of the batch is a token of an image.
        before={"hook_in": Input("")} | _attention("image_pooling_2d", name="pool.attn"),
        after={
            "pool.hook_attn_out": Output("image_pooling_2d"),
            "hook_pre": Output("image_projector.gate_proj", axes=_NEURON),
            "hook_pre_linear": Output("image_projector.up_proj", axes=_NEURON),
            "hook_post": Input("image_projector.down_proj", axes=_NEURON),
            "hook_out": Output("", axes=_TOKEN),
        },
        norm=None,
        takes="",
        gives="",
        pool="none",
    )
)
# The 7B of OLMo's kind normalises what a branch gives; ln1 and ln2 come after it there.
_ADDED = {
    "hook_attn_out": Built((("norm_after", True, Output("input_layernorm")),), Output("self_attn")),
    "hook_mlp_out": Built((("norm_after", True, Output("post_attention_layernorm")),), Output("mlp")),
}
_BLOCKS = Stack(("layers.*",), {**llama.BLOCKS.parts, **_ADDED})
register(decoder("molmo2_text", "Molmo2TextModel", blocks=_BLOCKS))
register(
    vlm("molmo2", "Molmo2ForConditionalGeneration", towers=TOWERS,
        images=Views("image_grids", newlines=("<im_col>",)))
)  # fmt: skip
