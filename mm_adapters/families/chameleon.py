"""Chameleon: a VQ model turns an image into words for the language model (arXiv 2405.09818)."""

from mm_adapters._registry import register
from mm_adapters._spec import Input, Mount, Mounts, Output, Stack, Tower
from mm_adapters.families._parts import norm
from mm_adapters.families.llama import BLOCKS

RESNET = {
    "hook_in": Input("", is_map=True),
    "hook_mid": Output("conv1", is_map=True),
    "hook_out": Output("", is_map=True),
}

register(
    Tower(
        "chameleon_vq",
        "vision",
        ("transformers:ChameleonVQVAE",),
        {"resnets": Stack(("encoder.down.*.block.*", "encoder.mid.block_*"), RESNET)},
        before={"hook_in": Input("encoder", is_map=True),
                "hook_embed": Output("encoder.conv_in", is_map=True)},
        # The code nearest to each latent is the word: an edit counts once it changes which is nearest.
        after={"hook_latent": Output("quant_conv", is_map=True)},
        absent={"blocks.*": "its encoder is convolutional", "decoder.*": "transformers has none"},
        norm=None,
        pool="none",
    )
)  # fmt: skip
register(
    Tower(
        "chameleon_text",
        "language",
        (),
        {"blocks": Stack(("layers.*",), BLOCKS.parts, classes=("ChameleonDecoderLayer",))},
        before={"hook_embed": Input("layers.0")},
        after=norm("norm", "ln_final", "RMS"),
        norm="RMS",
        takes="input_ids",
        gives="last_hidden_state",
        pool="each",
        embed="embed_tokens.weight",
        causal=True,
    )
)
register(
    Mounts(
        "chameleon",
        "vlm",
        ("transformers:ChameleonForConditionalGeneration",),
        {
            "vision": Mount("model.vqmodel"),
            # The language tower's parts are the model's own.
            "language": Mount("model", tower="chameleon_text", run="", gives="logits", takes="input_ids",
                              project="lm_head.weight.T"),
        },
        image_token="image_token_id",
    )
)  # fmt: skip
