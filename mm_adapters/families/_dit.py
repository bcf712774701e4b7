"""Parts of diffusion transformers, whose branches are scaled by a gate before they are added."""

from mm_adapters._spec import Input, Output, Parts, Stream
from mm_adapters.families._parts import inside, norm

# What attends is the two streams in one: q, k and v as the kernel is given them.
JOINT_ATTENTION = inside("attn", "heads", "q", "k", "v", "attn_scores", "pattern", "pattern_text", "z")
_FF = ("ff_context.net.0.proj", "ff_context.net.2")
DOUBLE_START: Parts = {
    "hook_resid_pre": Input("", argument="hidden_states"),
    "hook_text_resid_pre": Input("", argument="encoder_hidden_states"),
    **norm("norm1.norm", "ln1"),
    **norm("norm1_context.norm", "text_ln1"),
    **JOINT_ATTENTION,
    "hook_attn_out": Output("attn", item=0),
    "hook_text_attn_out": Output("attn", item=1, needs="ff_context"),
}
DOUBLE_END: Parts = {
    "hook_resid_mid": Stream("norm2", item=1),
    **norm("norm2", "ln2"),
    "mlp.hook_pre": Output("ff.net.0.proj"),
    "mlp.hook_post": Input("ff.net.2"),
    "hook_mlp_out": Output("ff"),
    "hook_text_resid_mid": Stream("norm2_context", item=0),
    **norm("norm2_context", "text_ln2"),
    "text_mlp.hook_pre": Output(_FF[0]),
    "text_mlp.hook_post": Input(_FF[1]),
    "hook_text_mlp_out": Output("ff_context"),
    "hook_text_resid_post": Output("", item=0, needs="ff_context"),
    "hook_resid_post": Output("", item=1),
}
