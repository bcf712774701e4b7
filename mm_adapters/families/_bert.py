"""Blocks that normalise after they add, as BERT's (arXiv 1810.04805); names as TransformerLens' for it."""

from mm_adapters.records import Input, Output, attention, norm

PARTS = (
    {"hook_resid_pre": Input("")}
    | attention("attention", q="self.query", k="self.key", v="self.value", o="output.dense",
                heads="self.num_attention_heads")
    | {"hook_attn_out": Output("attention.output.dense")}
    | {"hook_resid_mid": Input("attention.output.LayerNorm")}
    | norm("attention.output.LayerNorm", "ln1")
    | {"mlp.hook_pre": Output("intermediate.dense"), "mlp.hook_post": Input("output.dense")}
    | {"hook_mlp_out": Output("output.dense"), "hook_resid_post": Input("output.LayerNorm")}
    | norm("output.LayerNorm", "ln2")
    | {"hook_normalized_resid_post": Output("")}
)  # fmt: skip
