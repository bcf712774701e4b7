"""GPT-2 as a family, so that nnsight's tests of it run with our class; it is none of the package's."""

from mm_adapters.records import Input, ModelRecord, Output, Stack, Tower, TowerMount, norm, register

PARTS = {
    "hook_resid_pre": Input(""),
    "hook_attn_out": Output("attn"),
    "hook_mlp_out": Output("mlp"),
    "hook_resid_post": Output(""),
}


def register_gpt2() -> None:
    register(
        Tower(
            "gpt2", "language", ("transformers:GPT2Model",), {"blocks": Stack(("h.*",), PARTS)},
            before={"hook_embed": Input("h.0")}, after=norm("ln_f", "ln_final", "LN", 0.0), norm="LN",
            takes="input_ids", gives="last_hidden_state", pool="each", embed="wte.weight", causal=True,
        )
    )  # fmt: skip
    mount = TowerMount("transformer", run="", gives="logits", project="lm_head.weight.T")
    register(ModelRecord("gpt2_lm", "tower", ("transformers:GPT2LMHeadModel",), {"language": mount}))
