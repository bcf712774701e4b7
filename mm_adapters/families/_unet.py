"""Parts that the UNets of diffusers share."""

from mm_adapters.records import Input, Output, Parts, Stack, inside

RESNET: Parts = {
    "hook_in": Input("", is_map=True),
    "hook_mid": Output("conv1", is_map=True),
    "hook_out": Output("", is_map=True),
}
# Up blocks are registered before the middle one but run after it.
RESNETS = Stack(("down_blocks.*.resnets.*", "mid_block.resnets.*", "up_blocks.*.resnets.*"), RESNET)
# Attention straight on a map. With added projections (DeepFloyd IF, Kandinsky, unCLIP) the text's keys
# and values stand before the image's.
MAP_ATTENTION = Stack(
    ("down_blocks.*.attentions.*", "mid_block.attentions.*", "up_blocks.*.attentions.*"),
    {"hook_in": Input("", is_map=True)}
    | inside("", "heads", "q", "k", "v", "attn_scores", "pattern", "z")
    | {"hook_branch": Output("to_out.0"), "hook_out": Output("", is_map=True)},
    needs="to_q",
)
