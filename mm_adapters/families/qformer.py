"""Q-Formers: a few learned queries read an image by cross-attention (arXiv 2301.12597, 2305.06500)."""

from functools import partial

from mm_adapters.records import Input, Output, Stack, Tower, attention, norm, register

BERT = partial(attention, q="query", k="key", v="value", heads="num_attention_heads")


# Norms come after the branches, as BERT's do: each normalises the stream that a branch has joined.
PARTS = (
    {"hook_resid_pre": Input("")}
    | BERT("attention.attention", out="attention.output.dense")
    | {"hook_attn_out": Output("attention.output.dense"),
       "hook_resid_mid": Input("attention.output.LayerNorm")}
    | norm("attention.output.LayerNorm", "ln1")
    # Every second block reads the image, with its queries alone.
    | BERT("crossattention.attention", out="crossattention.output.dense", name="cross_attn")
    | {"hook_cross_attn_out": Output("crossattention.output.dense"),
       "hook_resid_mid_cross": Input("crossattention.output.LayerNorm")}
    | norm("crossattention.output.LayerNorm", "ln2")
    | {"mlp.hook_pre": Output("intermediate_query.dense"), "mlp.hook_post": Input("output_query.dense"),
       "hook_mlp_out": Output("output_query.dense"), "hook_resid_post": Input("output_query.LayerNorm")}
    | norm("output_query.LayerNorm", "ln3")
)  # fmt: skip
# An instruction's words have an MLP of their own (InstructBLIP).
TEXT = {"text_mlp.hook_pre": Output("intermediate.dense"), "text_mlp.hook_post": Input("output.dense"),
        "hook_text_mlp_out": Output("output.dense"),
        "hook_text_resid_post": Input("output.LayerNorm")}  # fmt: skip
END = {"hook_normalized_resid_post": Output("")}

for _name, _classes, _embed, _parts in (
    ("qformer", ("Blip2QFormerModel",), "layernorm", PARTS | END),
    ("qformer_with_text", ("InstructBlipQFormerModel",), "embeddings", PARTS | TEXT | END),
):
    register(
        Tower(
            _name,
            "qformer",
            tuple(f"transformers:{c}" for c in _classes),
            {"blocks": Stack(("encoder.layer.*",), _parts)},
            before={"hook_embed": Output(_embed)},
            absent={"ln_final.*": "each block normalises its own result"},
            takes="query_embeds",
            gives="last_hidden_state",
            pool="none",
        )
    )
