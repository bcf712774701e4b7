"""Swin and Swin V2: windows of a grid that is halved from stage to stage (arXiv 2103.14030, 2111.09883)."""

from dataclasses import replace

from mm_adapters.records import (
    Input,
    ModelRecord,
    Output,
    Residual,
    Stack,
    Stages,
    Tower,
    TowerMount,
    attention,
    norm,
    register,
)

# transformers 5.17 has other modules in a block than 5.22, and Swin V2 those of 5.17.
_ATTENTION = attention("attention", q="q_proj|self.query", k="k_proj|self.key", v="v_proj|self.value",
                       o="o_proj|output.dense",
                       heads="num_attention_heads|self.num_attention_heads")  # fmt: skip
_MLP = {"mlp.hook_pre": Output("mlp.fc1|intermediate.dense"), "mlp.hook_post": Input("mlp.fc2|output.dense")}
_MID = {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
_PRE, _POST = {"hook_resid_pre": Input("")}, {"hook_resid_post": Output("")}
_LN1, _LN2 = norm("layernorm_before", "ln1"), norm("layernorm_after", "ln2")
_BLOCKS = ("encoder.layers.*.blocks.*",)

SWIN = register(
    Tower(
        "swin",
        "vision",
        ("transformers:SwinModel",),
        {
            "blocks": Stack(
                _BLOCKS,
                _PRE
                | _LN1
                | _ATTENTION
                # Here the windows are a grid again, as the stream is.
                | {"hook_attn_out": Output("drop_path")}
                | _MID
                | _LN2
                | _MLP
                | {"hook_mlp_out": Output("mlp|output")}
                | _POST,
            ),
            "merges": Stack(("encoder.layers.*.downsample",), norm("norm", "ln") | {"hook_out": Output("")}),
        },
        before={"hook_embed": Output("embeddings")},
        after=norm("layernorm", "ln_final"),
        absent={"hook_pos_embed": "a bias on the scores, or a table added without a module; see W_pos"},
        pool="mean",
        position="embeddings.position_embeddings",
        patch="embeddings.patch_embeddings.projection",
        any_size=True,
        order=Stages(rolls_larger_only=True),
    )
)
# What a branch gives is normalised, and not what it is given.
_V2 = (
    _PRE
    | _ATTENTION
    | _LN1
    | {"hook_attn_out": Output("layernorm_before")}
    | _MID
    | _MLP
    | _LN2
    | {"hook_mlp_out": Output("layernorm_after")}
    | _POST
)
register(
    replace(SWIN, name="swinv2", classes=("transformers:Swinv2Model",), order=Stages(),
            stacks={"blocks": Stack(_BLOCKS, _V2), "merges": SWIN.stacks["merges"]})
)  # fmt: skip
for _name, _path in {"Swin": "swin", "Swinv2": "swinv2"}.items():
    _mount = TowerMount(_path, run="", gives="logits", project="classifier.weight.T")
    register(ModelRecord(f"{_path}_classifier", "tower", (f"transformers:{_name}ForImageClassification",),
                    {"vision": _mount}))  # fmt: skip
