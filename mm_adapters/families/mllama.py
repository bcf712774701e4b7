"""Llama 3.2 Vision: some language blocks read an image's tiles through a gate (arXiv 2407.21783)."""

from mm_adapters.families._parts import decoder, vlm
from mm_adapters.families.llava import LANGUAGE
from mm_adapters.records import (
    Input,
    Output,
    Queries,
    Stack,
    Stream,
    Tower,
    TowerMount,
    attention,
    gated_mlp,
    mlp,
    norm,
    pre_norm,
    register,
)

VISION = pre_norm(ln1="input_layernorm", attn="self_attn", heads=attention("self_attn", o="o_proj"),
                  ln2="post_attention_layernorm", ff="mlp", neurons=mlp("mlp"))  # fmt: skip
GATED = VISION | {
    "hook_attn_out": Output("self_attn", gain="gate_attn.tanh"),
    "hook_resid_mid": Stream("post_attention_layernorm"),
    "hook_mlp_out": Output("mlp", gain="gate_ffn.tanh"),
}
# A block attends to words or to the image; those that read the image are gated.
LANGUAGE_BLOCKS = Stack(
    ("layers.*",),
    {"hook_resid_pre": Input("")}
    | norm("input_layernorm", "ln1", "RMS")
    | attention("self_attn", o="o_proj", kv_heads="num_key_value_heads", rotary=True)
    | {"hook_attn_out": Output("self_attn")}
    | attention("cross_attn", o="o_proj", kv_heads="num_key_value_heads", rotary=True, name="cross_attn")
    | {"hook_cross_attn_out": Output("cross_attn", gain="cross_attn_attn_gate.tanh")}
    | {"hook_resid_mid": Stream("post_attention_layernorm")}
    | norm("post_attention_layernorm", "ln2", "RMS")
    | gated_mlp("mlp")
    | {"hook_mlp_out": Output("mlp", gain="cross_attn_mlp_gate.tanh"), "hook_resid_post": Output("")},
)

register(
    Tower(
        "mllama_vision",
        "vision",
        ("transformers:MllamaVisionModel",),
        {"blocks": Stack(("transformer.layers.*",), VISION),
         "global_blocks": Stack(("global_transformer.layers.*",), GATED)},
        # Each image is one row: its tiles end to end, each with its class token and padding.
        before={"hook_embed": Input("transformer.layers.0")},
        after=norm("layernorm_post", "ln_final"),  # Between the two stacks.
        gives="last_hidden_state",
        pool="none",
        patch="patch_embedding",
        n_class=1,
        order="tiles",
    )
)  # fmt: skip
TILES = ("batch", "image", "tile", "pos", "d_model")
register(
    Tower(
        "mllama_projector",
        "projector",
        (),
        {},
        before={"hook_in": Input("", axes=TILES)},
        after={"hook_out": Output("", axes=TILES)},
        norm=None,
        takes="input",
        gives="",
        pool="none",
    )
)
register(decoder("mllama_text", "MllamaTextModel", blocks=LANGUAGE_BLOCKS))
register(
    vlm("mllama", "MllamaForConditionalGeneration", towers={
        "vision": TowerMount("model.vision_model"),
        "projector": TowerMount("model.multi_modal_projector", tower="mllama_projector"),
        "language": LANGUAGE,
    }, images=Queries(role="image"))
)  # fmt: skip
