"""CLAP: sound and text in one space; its audio tower is a Swin of spectrograms (arXiv 2211.06687)."""

from dataclasses import replace

from mm_adapters.families import bert
from mm_adapters.records import (
    Input,
    ModelRecord,
    Output,
    Stack,
    Stream,
    Tower,
    TowerMount,
    attention,
    norm,
    register,
)

register(
    Tower(
        "clap_audio",
        "audio",
        ("transformers:ClapAudioModel",),
        {
            "blocks": Stack(
                ("audio_encoder.layers.*.blocks.*",),
                {"hook_resid_pre": Input("")}
                | norm("layernorm_before", "ln1")
                # Attention is within windows, which are its rows here.
                | attention("attention", q="self.query", k="self.key", v="self.value", o="output.dense",
                            heads="self.num_attention_heads")
                | {"hook_attn_out": Output("attention.output"), "hook_resid_mid": Stream("layernorm_after")}
                | norm("layernorm_after", "ln2")
                | {"mlp.hook_pre": Output("intermediate.dense"), "mlp.hook_post": Input("output.dense")}
                | {"hook_mlp_out": Output("output"), "hook_resid_post": Output("")},
            )
        },
        before={"hook_embed": Output("audio_encoder.patch_embed")},
        after=norm("audio_encoder.norm", "ln_final"),
        takes="input_features",
        pool="mean",
    )
)  # fmt: skip
register(
    replace(
        bert.BERT,
        name="clap_text",
        classes=("transformers:ClapTextModel",),
        after={"hook_pooled": Output("pooler.activation")},
        gives="pooler_output",
        pool="none",
    )
)
register(
    ModelRecord(
        "clap",
        "contrastive",
        ("transformers:ClapModel",),
        {
            # The projections are not linear, so no one matrix reads a summary off the stream.
            "audio": TowerMount("audio_model", run="get_audio_features"),
            "text": TowerMount("text_model", run="get_text_features"),
        },
    )
)
