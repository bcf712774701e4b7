"""One random OPT twice: as SAELens' HookedSAETransformer, and as a tower of ours; and SAEs for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as hf
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    HookedSAETransformer,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_opt_weights

import mm_adapters as mm

WORDS = ["a", "red", "blue", "circle", "square", "on", "white", "green"]
ROWS = torch.tensor([[2, 5, 7, 9, 11, 40], [2, 8, 11, 12, 3, 30]])
# Each with the width that an SAE there takes; an attention SAE has its heads side by side.
WIDTHS = {"attn.hook_z": 24, "hook_mlp_out": 24, "mlp.hook_post": 32, "hook_resid_pre": 24}
_KINDS: dict[str, tuple[type[SAE[Any]], Any]] = {
    "standard": (StandardSAE, StandardSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    "topk": (TopKSAE, lambda **given: TopKSAEConfig(k=5, **given)),
}


def sae_at(site: str, seed: int = 0, kind: str = "standard", layer: int = 0, **config: Any) -> Any:
    """An SAE of random weights at "blocks.LAYER.SITE", heads apart where SAELens' are."""
    torch.manual_seed(seed)
    by_head = {"reshape_activations": "hook_z"} if site == "attn.hook_z" else {}
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.{site}")
    make, configure = _KINDS[kind]
    return noisy(make(configure(d_in=WIDTHS[site], d_sae=40, metadata=metadata, **by_head | config)))


def transcoder(read: str = "ln2.hook_normalized", skip: bool = False) -> Any:
    """A transcoder of block 0's MLP."""
    torch.manual_seed(7)
    metadata = SAEMetadata(hook_name=f"blocks.0.{read}", hook_name_out="blocks.0.hook_mlp_out")
    make, config = (SkipTranscoder, SkipTranscoderConfig) if skip else (Transcoder, TranscoderConfig)
    return noisy(make(config(d_in=24, d_sae=40, d_out=24, apply_b_dec_to_input=False, metadata=metadata)))


def noisy(module: Any) -> Any:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.eval()


def opt() -> Any:
    torch.manual_seed(0)
    config = hf.OPTConfig(
        hidden_size=24, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        word_embed_proj_dim=24, max_position_embeddings=32, pad_token_id=1, dropout=0.0,
    )  # fmt: skip
    return noisy(hf.OPTForCausalLM(config).eval())


@cache
def tokenizer() -> Any:
    """Words of the zoo's world; OPT's own special tokens."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def theirs() -> Any:
    config = HookedTransformerConfig(
        n_layers=2, d_model=24, n_ctx=32, d_head=12, n_heads=2, d_mlp=32, d_vocab=64, act_fn="relu",
        normalization_type="LN", device="cpu", original_architecture="OPTForCausalLM",
    )  # fmt: skip
    model = HookedSAETransformer(config)
    model.load_state_dict(convert_opt_weights(opt(), config), strict=False)
    model.tokenizer, model.cfg.tokenizer_prepends_bos = tokenizer(), False  # set_tokenizer asks the hub.
    return model.eval()


def ours() -> Any:
    import integrations.sae_lens  # noqa: F401  (gives towers the verbs)

    return mm.wrap(opt(), tokenizer=tokenizer()).language
