"""Emu3: a VQ model turns an image into lines of words for the language model (arXiv 2409.18869)."""

from mm_adapters.families._parts import language, vlm
from mm_adapters.families.chameleon import RESNET
from mm_adapters.records import Input, Lines, Output, Stack, Tower, TowerMount, register

FRAMES = ("batch", "channel", "time", "height", "width")

register(
    Tower(
        "emu3_vq",
        "vision",
        ("transformers:Emu3VQVAE",),
        # An image is a film of a few equal frames: frames are rows of the batch.
        {"resnets": Stack(("encoder.down_block.down.*.block.*", "encoder.middle_block.block_*"), RESNET)},
        before={"hook_in": Input("encoder", axes=("batch", "time", "channel", "height", "width")),
                "hook_embed": Output("encoder.conv_in", is_map=True)},
        # The code nearest to each latent is the word: an edit counts once it changes which is nearest.
        after={"hook_latent": Output("quant_conv", axes=FRAMES)},
        absent={"blocks.*": "its encoder is convolutional", "decoder.*": "it draws in generate alone"},
        norm=None,
        pool="none",
    )
)  # fmt: skip
register(
    vlm("emu3", "Emu3ForConditionalGeneration", towers={
        "vision": TowerMount("model.vqmodel"),
        "language": language("model.text_model"),
    }, images=Lines())
)  # fmt: skip
