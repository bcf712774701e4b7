"""Chameleon: a VQ model turns an image into words for the language model (arXiv 2405.09818)."""

from mm_adapters.families._parts import decoder, language, vlm
from mm_adapters.families.llama import BLOCKS
from mm_adapters.records import Input, Output, Stack, Tower, TowerMount, register

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
    decoder("chameleon_text",
            blocks=Stack(("layers.*",), BLOCKS.parts, classes=("ChameleonDecoderLayer",)))
)  # fmt: skip
register(
    vlm("chameleon", "ChameleonForConditionalGeneration", towers={
        "vision": TowerMount("model.vqmodel"),
        # Its parts are the model's own.
        "language": language("model", "chameleon_text"),
    })
)  # fmt: skip
