"""Parts of diffusion transformers, whose branches are scaled by a gate before they are added."""

from mm_adapters.records import Input, Output, Parts, Stream, inside, norm

# What attends is the two streams in one: q, k and v as the kernel is given them.
JOINT_ATTENTION = inside("attn", "heads", "q", "k", "v", "attn_scores", "pattern", "pattern_text", "z")


def double_block(ln1: str, ln2: str, mlp: str, *, text: tuple[str, str, str]) -> tuple[Parts, Parts]:
    """A block of two streams that attend as one: what comes before its second residual, and the rest.

    `ln1`, `ln2` and `mlp` are the image's modules, `text` the text's, which a last block may lack.
    """
    text_ln1, text_ln2, text_mlp = text
    start: Parts = {
        "hook_resid_pre": Input("", argument="hidden_states"),
        "hook_text_resid_pre": Input("", argument="encoder_hidden_states"),
        **norm(ln1, "ln1"),
        **norm(text_ln1, "text_ln1"),
        **JOINT_ATTENTION,
        "hook_attn_out": Output("attn", item=0),
        "hook_text_attn_out": Output("attn", item=1, needs=text_mlp),
    }
    end: Parts = {
        "hook_resid_mid": Stream(ln2, item=1),
        **norm(ln2, "ln2"),
        "mlp.hook_pre": Output(f"{mlp}.net.0.proj"),
        "mlp.hook_post": Input(f"{mlp}.net.2"),
        "hook_mlp_out": Output(mlp),
        "hook_text_resid_mid": Stream(text_ln2, item=0),
        **norm(text_ln2, "text_ln2"),
        "text_mlp.hook_pre": Output(f"{text_mlp}.net.0.proj"),
        "text_mlp.hook_post": Input(f"{text_mlp}.net.2"),
        "hook_text_mlp_out": Output(text_mlp),
        "hook_text_resid_post": Output("", item=0, needs=text_mlp),
        "hook_resid_post": Output("", item=1),
    }
    return start, end


DOUBLE_START, DOUBLE_END = double_block(
    "norm1.norm", "norm2", "ff", text=("norm1_context.norm", "norm2_context", "ff_context")
)
