"""A small random OPT as TransformerLens' HookedTransformer and as ours: the same weights, the same logits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import mm_adapters as mm

N_LAYERS, N_HEADS, WIDTH, N_CTX = 3, 4, 32, 64


@dataclass(frozen=True)
class Pair:
    """`theirs` is a HookedTransformer, `ours` the tower of a model of ours."""

    hooked_transformer: Any
    ours: Any
    model: Any
    raw: Any

    @property
    def theirs(self) -> Any:
        if self.hooked_transformer is None:
            pytest.skip("TransformerLens 4 has no HookedTransformer.")
        return self.hooked_transformer


def tokenizer(side: str = "right") -> Any:
    """Letters and spaces; the start token is also the end and the padding, as in GPT-2."""
    pieces = ["<|endoftext|>", " ", *"abcdefghijklmnopqrstuvwxyz"]
    plain = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token=" "))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    plain.decoder = decoders.Fuse()
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token=pieces[0], eos_token=pieces[0], pad_token=pieces[0], unk_token=" "
    )
    made.padding_side = side
    # Else TransformerLens loads one by its name.
    made.init_kwargs.update(add_bos_token=True, name_or_path="")
    return made


def raw_opt(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = hf.OPTConfig(
        vocab_size=28, hidden_size=WIDTH, num_hidden_layers=N_LAYERS, num_attention_heads=N_HEADS, ffn_dim=48,
        max_position_embeddings=N_CTX, word_embed_proj_dim=WIDTH, dropout=0.0,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = hf.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def pair(side: Any = "right", seed: int = 0) -> Pair:
    """Both, over the same weights; theirs are neither folded nor centred."""
    raw = raw_opt(seed)
    model: Any = mm.wrap(raw, tokenizer=tokenizer(side))
    return Pair(_hooked_transformer(raw, side), model.language, model, raw)


def _hooked_transformer(raw: Any, side: Any) -> Any:
    """TransformerLens' model of the same weights; None from TransformerLens 4 on."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions.opt import convert_opt_weights
    except ImportError:
        return None
    cfg = HookedTransformerConfig(
        d_model=WIDTH, d_head=WIDTH // N_HEADS, n_heads=N_HEADS, n_layers=N_LAYERS, n_ctx=N_CTX, d_mlp=48,
        d_vocab=28, act_fn="relu", device="cpu", eps=1e-5, normalization_type="LN",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = HookedTransformer(cfg, tokenizer=tokenizer(side), default_padding_side=side)
    theirs.load_state_dict(convert_opt_weights(raw, cfg), strict=False)
    return theirs.eval()
