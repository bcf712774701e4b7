"""BLIP: text towers that read the image by cross-attention, for captions, answers and matching
(arXiv 2201.12086)."""

from functools import partial

from mm_adapters.records import (
    Input,
    ModelRecord,
    Output,
    Stack,
    Tower,
    TowerMount,
    attention,
    norm,
    register,
)

BERT = partial(attention, q="query", k="key", v="value", heads="num_attention_heads")
# Norms come after the branches, as BERT's do: each normalises the stream that a branch has joined.
BLOCKS = Stack(
    ("encoder.layer.*",),
    {"hook_resid_pre": Input("")}
    | BERT("attention.self", out="attention.output.dense")
    | {"hook_attn_out": Output("attention.output.dense"),
       "hook_resid_mid": Input("attention.output.LayerNorm")}
    | norm("attention.output.LayerNorm", "ln1")
    | BERT("crossattention.self", out="crossattention.output.dense", name="cross_attn")
    | {"hook_cross_attn_out": Output("crossattention.output.dense"),
       "hook_resid_mid_cross": Input("crossattention.output.LayerNorm")}
    | norm("crossattention.output.LayerNorm", "ln2")
    | {"mlp.hook_pre": Output("intermediate.dense"), "mlp.hook_post": Input("output.dense"),
       "hook_mlp_out": Output("output.dense"), "hook_resid_post": Input("output.LayerNorm")}
    | norm("output.LayerNorm", "ln3")
    | {"hook_normalized_resid_post": Output("")},
)  # fmt: skip

register(
    Tower(
        "blip_text",
        "text",
        ("transformers:BlipTextModel",),
        {"blocks": BLOCKS},
        before={"hook_embed": Output("embeddings")},
        absent={"ln_final.*": "each block normalises its own result"},
        takes="input_ids",
        gives="last_hidden_state",
        pool="each",
        embed="embeddings.word_embeddings.weight",
        position="embeddings.position_embeddings.weight",
    )
)
VISION = TowerMount("vision_model")
ENCODER = TowerMount("text_encoder")
DECODER = TowerMount("text_decoder.bert")
for _name, _model, _towers in (
    ("blip", "ConditionalGeneration", {"vision": VISION, "language": DECODER}),
    ("blip_itm", "ImageTextRetrieval", {"vision": VISION, "text": ENCODER}),
    ("blip_vqa", "QuestionAnswering", {
        "vision": VISION, "text": ENCODER,
        "language": TowerMount("text_decoder.bert", takes="decoder_input_ids")}),
):  # fmt: skip
    register(ModelRecord(_name, "vlm", (f"transformers:BlipFor{_model}",), _towers, prompt=None))
