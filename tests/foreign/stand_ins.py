"""GPT-2, BERT and BART as families, so that nnsight's tests of them run with our class; none is ours."""

from mm_adapters.records import Input, ModelRecord, Output, Stack, Tower, TowerMount, norm, register

PARTS = {
    "hook_resid_pre": Input(""),
    "hook_attn_out": Output("attn"),
    "hook_mlp_out": Output("mlp"),
    "hook_resid_post": Output(""),
}
_HEADS = ("MaskedLM", "SequenceClassification", "QuestionAnswering", "MultipleChoice")


def register_all() -> None:
    """Registers them, once in a process."""
    _gpt2()
    _bert()
    _bart()


def _gpt2() -> None:
    register(
        Tower(
            "gpt2", "language", ("transformers:GPT2Model",), {"blocks": Stack(("h.*",), PARTS)},
            before={"hook_embed": Input("h.0")}, after=norm("ln_f", "ln_final", "LN", 0.0), norm="LN",
            takes="input_ids", gives="last_hidden_state", pool="each", embed="wte.weight",
            position="wpe.weight", causal=True,
        )
    )  # fmt: skip
    mount = TowerMount("transformer", run="", gives="logits", project="lm_head.weight.T")
    register(ModelRecord("gpt2_lm", "tower", ("transformers:GPT2LMHeadModel",), {"language": mount}))


def _bert() -> None:
    """BERT's own sites, under the heads that read it."""
    mount = TowerMount("bert", run="", gives="logits")
    heads = tuple(f"transformers:BertFor{head}" for head in _HEADS)
    register(ModelRecord("bert_heads", "tower", heads, {"text": mount}))


def _bart() -> None:
    """BART's decoder; its encoder is a part of the run without sites."""
    mount = TowerMount("model.decoder", run="", gives="logits", takes="input_ids")
    register(
        ModelRecord("bart_lm", "tower", ("transformers:BartForConditionalGeneration",), {"language": mount})
    )
