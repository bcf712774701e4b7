"""BERT and its kin, as text towers of composite models (arXiv 1810.04805)."""

from mm_adapters.families import _bert
from mm_adapters.records import Output, Stack, Tower, register

BERT = register(
    Tower(
        "bert",
        "text",
        ("transformers:BertModel", "transformers:RobertaModel", "transformers:XLMRobertaModel"),
        {"blocks": Stack(("encoder.layer.*",), _bert.PARTS)},
        before={
            "hook_embed": Output("embeddings.word_embeddings"),
            "hook_pos_embed": Output("embeddings.position_embeddings", reference_site="hook_embed"),
            "hook_full_embed": Output("embeddings"),
        },
        absent={"ln_final.*": "each block normalises its own result"},
        takes="input_ids",
        gives="last_hidden_state",
        embed="embeddings.word_embeddings.weight",
        position="embeddings.position_embeddings.weight",
    )
)
